"""Checkpoints on disk."""

import os
import shutil

import pytest
import torch

import fastmoe
from fastmoe.train import checkpoint


def save(folder, *steps):
    for step in steps:
        path = checkpoint.path_of(folder, step)
        fastmoe.save(torch.nn.Linear(4, 4), None, path, extra={"step": step})


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def step_of_newest(folder):
    return checkpoint.newest(folder, checkpoint.read_extra)["step"]


def test_the_newest_is_found_by_number_not_by_name(tmp_path):
    save(tmp_path, 9, 10, 123456789)
    assert [path.name for path in checkpoint.checkpoints(tmp_path)] == [
        "step-123456789",
        "step-00000010",
        "step-00000009",
    ]
    assert step_of_newest(tmp_path) == 123456789


def test_only_the_newest_are_kept(tmp_path):
    save(tmp_path, 1, 2, 3, 4)
    checkpoint.prune(tmp_path, keep=2)
    assert names(tmp_path) == ["step-00000003", "step-00000004"]


def test_a_folder_without_checkpoints_has_none_to_read(tmp_path):
    assert checkpoint.newest(tmp_path, checkpoint.read_extra) is None
    assert checkpoint.newest(tmp_path / "missing", checkpoint.read_extra) is None


def test_a_leftover_of_a_broken_save_is_ignored_and_cleared(tmp_path):
    save(tmp_path, 1)
    shutil.copytree(tmp_path / "step-00000001", tmp_path / "step-00000002.partial")
    assert step_of_newest(tmp_path) == 1
    save(tmp_path, 3)
    checkpoint.prune(tmp_path, keep=2)
    assert names(tmp_path) == ["step-00000001", "step-00000003"]


def test_a_kill_while_deleting_leaves_no_part_of_a_checkpoint(tmp_path, monkeypatch):
    save(tmp_path, 1, 2)

    def killed(path):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            checkpoint.prune(tmp_path, keep=1)
    assert names(tmp_path) == ["step-00000001.partial", "step-00000002"]
    checkpoint.prune(tmp_path, keep=1)
    assert names(tmp_path) == ["step-00000002"]


DAMAGE = {
    "cut": lambda path: os.truncate(path / "__0_0.distcp", 100),
    "lost": lambda path: (path / "__0_0.distcp").unlink(),
    "unfinished": lambda path: (path / "fastmoe.json").unlink(),
    "garbled": lambda path: (path / "fastmoe.json").write_text("{"),
    "empty": lambda path: [file.unlink() for file in path.iterdir()],
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_falls_back_to_the_one_before(tmp_path, damage):
    save(tmp_path, 1, 2)
    DAMAGE[damage](tmp_path / "step-00000002")
    with pytest.warns(UserWarning, match="step-00000002 cannot be read"):
        assert step_of_newest(tmp_path) == 1
    checkpoint.delete(tmp_path / "step-00000001")
    with (
        pytest.warns(UserWarning, match="cannot be read"),
        pytest.raises(ValueError, match="none of the 1 checkpoints"),
    ):
        step_of_newest(tmp_path)


def test_one_of_another_run_is_not_passed_over(tmp_path):
    save(tmp_path, 1, 2)

    def read(path):
        raise checkpoint.OtherRunError("another model")

    with pytest.raises(ValueError, match="another model"):
        checkpoint.newest(tmp_path, read)


def test_all_can_be_deleted(tmp_path):
    save(tmp_path, 1, 2)
    (tmp_path / "step-00000003.partial").mkdir()
    (tmp_path / "notes.txt").touch()
    checkpoint.prune(tmp_path, keep=0)
    assert names(tmp_path) == ["notes.txt"]
