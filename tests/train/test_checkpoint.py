"""Checkpoints on disk."""

import pytest
import torch

from fastmoe.train import checkpoint


def save(folder, *steps, keep=10):
    for step in steps:
        checkpoint.save({"step": step, "weights": torch.full((1000,), float(step))}, folder, step, keep)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_the_newest_one_is_loaded_by_number_not_by_name(tmp_path):
    save(tmp_path, 9, 10, 123456789)
    path, state = checkpoint.load_newest(tmp_path)
    assert path.name == "step-123456789.pt"
    assert state["step"] == 123456789
    assert torch.equal(state["weights"], torch.full((1000,), 123456789.0))


def test_only_the_newest_are_kept(tmp_path):
    save(tmp_path, 1, 2, 3, 4, keep=2)
    assert names(tmp_path) == ["step-00000003.pt", "step-00000004.pt"]


def test_a_folder_without_checkpoints_has_none_to_load(tmp_path):
    assert checkpoint.load_newest(tmp_path) is None
    assert checkpoint.load_newest(tmp_path / "missing") is None


def test_a_leftover_of_a_broken_save_is_ignored_and_cleared(tmp_path):
    save(tmp_path, 1)
    (tmp_path / "step-00000002.partial").write_bytes((tmp_path / "step-00000001.pt").read_bytes()[:100])
    assert checkpoint.load_newest(tmp_path)[1]["step"] == 1
    save(tmp_path, 3)
    assert names(tmp_path) == ["step-00000001.pt", "step-00000003.pt"]


@pytest.mark.parametrize("damage", [lambda content: content[: len(content) // 2], lambda content: b""])
def test_a_damaged_checkpoint_falls_back_to_the_one_before(tmp_path, damage):
    save(tmp_path, 1, 2)
    path = tmp_path / "step-00000002.pt"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.warns(UserWarning, match="step-00000002.pt cannot be read"):
        assert checkpoint.load_newest(tmp_path)[1]["step"] == 1
    (tmp_path / "step-00000001.pt").unlink()
    with (
        pytest.warns(UserWarning, match="cannot be read"),
        pytest.raises(ValueError, match="none of the 1 checkpoints"),
    ):
        checkpoint.load_newest(tmp_path)


def test_a_save_that_fails_leaves_the_older_checkpoint(tmp_path, monkeypatch):
    save(tmp_path, 1)

    def full_disk(state, file):
        file.write(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr(torch, "save", full_disk)
    with pytest.raises(OSError, match="no space"):
        save(tmp_path, 2)
    assert checkpoint.load_newest(tmp_path)[1]["step"] == 1


def test_all_can_be_deleted(tmp_path):
    save(tmp_path, 1, 2)
    (tmp_path / "step-00000003.partial").touch()
    (tmp_path / "notes.txt").touch()
    checkpoint.delete_all(tmp_path)
    assert names(tmp_path) == ["notes.txt"]
