"""The files of a checkpoint: whole under their name at every moment, and looked at before they are loaded."""

import contextlib
import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from checkpoint_cases import assert_same, state_of, trained
from torch import nn
from torch.distributed.checkpoint import FileSystemReader

from fastmoe import load, save
from fastmoe.parallel import checkpoint_planner
from fastmoe.parallel.global_state import Piece


class Killed(BaseException):
    """As a SIGKILL: nothing in the package catches it."""


def kill_at(patch, number):
    """The operation on files of this number dies; returns the list of those that were begun."""
    calls = []

    def dying(real):
        def operation(*args, **kwargs):
            calls.append(real)
            if len(calls) == number:
                raise Killed
            return real(*args, **kwargs)

        return operation

    for owner, name in ((Path, "mkdir"), (Path, "rename"), (os, "fsync"), (shutil, "rmtree"), (Path, "unlink")):
        patch.setattr(owner, name, dying(getattr(owner, name)))
    return calls


@pytest.mark.parametrize("left", ["nothing", "partial", "previous"])
def test_killed_between_any_two_steps(tmp_path, monkeypatch, left):
    """Old or new, whole, after each operation on files; the next save leaves nothing else behind."""
    model, one, found = nn.Linear(2, 2), tmp_path / "one", []
    for number in range(1, 40):
        shutil.rmtree(one, ignore_errors=True)
        save(model, None, one, extra="old")
        if left != "nothing":
            shutil.copytree(one, tmp_path / f"one.{left}")
        with monkeypatch.context() as patch, contextlib.suppress(Killed):
            calls = kill_at(patch, number)
            save(model, None, one, extra="new", overwrite=True)
        found.append(load(model, None, one))
        save(model, None, one, extra="newer", overwrite=True)
        assert load(model, None, one) == "newer"
        assert [path.name for path in tmp_path.iterdir()] == ["one"]
        if len(calls) < number:
            break
    assert found == sorted(found, reverse=True)
    assert set(found) == {"old", "new"}


def test_who_writes_what():
    """What two processes hold is shared out by size; buffers, which may differ, are all of the first."""
    wide, narrow, counter = torch.ones(5, 5), torch.ones(2), torch.ones(50)
    pieces = [
        Piece("wide", wide, (5, 5), (0, 0)),
        Piece("narrow", narrow, (2,), (0,)),
        Piece("counter", counter, (50,), (0,), buffer=True),
        Piece("other", narrow, (2,), (0,)),
    ]
    planners = [checkpoint_planner.PieceSavePlanner(pieces) for _ in range(2)]
    plans, _ = planners[0].create_global_plan([planner.create_local_plan() for planner in planners])
    assert [[item.index.fqn for item in plan.items] for plan in plans] == [["wide", "counter"], ["narrow", "other"]]


def test_an_asynchronous_save_that_fails(tmp_path, monkeypatch):
    model, optimizer = trained()
    with monkeypatch.context() as patch:

        def full(planner, item):
            raise OSError(28, "No space left on device")

        patch.setattr(checkpoint_planner.PieceSavePlanner, "resolve_data", full)
        pending = save(model, optimizer, tmp_path / "one", asynchronous=True)
        with pytest.raises(OSError, match="No space"):
            pending.wait()
        save(model, optimizer, tmp_path / "two", asynchronous=True)
        with pytest.raises(OSError, match="No space"):
            save(model, optimizer, tmp_path / "three")
    assert not list(tmp_path.iterdir())
    save(model, optimizer, tmp_path / "three")
    assert load(model, optimizer, tmp_path / "three") is None


def test_overwriting(tmp_path):
    model, optimizer = trained()
    save(model, optimizer, tmp_path / "one", extra=1)
    with pytest.raises(ValueError, match="one is there already: give overwrite=True"):
        save(model, optimizer, tmp_path / "one", extra=2)
    assert load(model, optimizer, tmp_path / "one") == 1
    save(model, optimizer, str(tmp_path / "one") + "/", extra=2, overwrite=True)
    assert load(model, optimizer, tmp_path / "one") == 2
    (tmp_path / "one").rename(tmp_path / "one.previous")
    with pytest.raises(ValueError, match=r"one\.previous is there already"):
        save(model, optimizer, tmp_path / "one")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("")
    with pytest.raises(ValueError, match=r"mine is not a checkpoint of fastmoe\.save: it is not overwritten"):
        save(model, optimizer, tmp_path / "mine", overwrite=True)
    assert (tmp_path / "mine" / "thesis.tex").exists()


DAMAGE = {
    "no folder": (shutil.rmtree, "there is no checkpoint"),
    "no document": (lambda path: (path / "fastmoe.json").unlink(), "it has no fastmoe.json"),
    "no metadata": (lambda path: (path / ".metadata").unlink(), r"it has no \.metadata"),
    "bad document": (lambda path: (path / "fastmoe.json").write_text("{"), r"fastmoe\.json cannot be read"),
    "bad metadata": (lambda path: (path / ".metadata").write_bytes(b"x"), r"\.metadata cannot be read"),
    "format": (lambda path: (path / "fastmoe.json").write_text('{"format": 9}'), "has format 9, this fastmoe reads"),
    "no data": (lambda path: (path / "__0_0.distcp").unlink(), r"has no __0_0\.distcp"),
    "short data": (lambda path: os.truncate(path / "__0_0.distcp", 3000), "is damaged: expected .* bytes, got 3000"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_checkpoint(tmp_path, kind):
    damage, words = DAMAGE[kind]
    path = tmp_path / "one"
    model, optimizer = trained()
    save(model, optimizer, path)
    damage(path)
    before = {name: value.clone() for name, value in state_of(model, optimizer).items()}
    with pytest.raises(ValueError, match=words):
        load(model, optimizer, path)
    assert_same(state_of(model, optimizer), before)


def test_missing_chunks_are_missing_experts(tmp_path, monkeypatch):
    """Nothing is filled: what no chunk holds is named."""
    monkeypatch.setattr(checkpoint_planner, "CHUNK_BYTES", 1)
    model, optimizer = trained()
    save(model, optimizer, tmp_path / "one")
    reader = FileSystemReader(tmp_path / "one")
    metadata = reader.read_metadata()
    for name in ("model.stacked.experts.w1", "optimizer.stacked.experts.b2.exp_avg"):
        chunks = metadata.state_dict_metadata[name].chunks
        assert [chunk.offsets[0] for chunk in chunks] == [0, 1, 2, 3, 4]
        del chunks[1:3]
    metadata.state_dict_metadata["model.kept"].chunks.clear()
    (tmp_path / "one" / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(ValueError, match=r"the checkpoint lacks experts 1, 2 of stacked\.experts\.w1") as raised:
        load(model, optimizer, tmp_path / "one")
    assert "only parts: kept" in str(raised.value)


def test_a_process_reads_its_own_experts(tmp_path, monkeypatch):
    """Of the chunks written, those with an expert in them that the process will hold."""
    monkeypatch.setattr(checkpoint_planner, "CHUNK_BYTES", 1)
    save(*trained(), tmp_path / "one")
    metadata = FileSystemReader(tmp_path / "one").read_metadata()
    name = "model.stacked.experts.w1"
    piece = Piece(name, torch.empty(2, 8, 6), (5, 8, 6), (3, 0, 0))
    plan = checkpoint_planner.PieceLoadPlanner([piece], metadata).create_local_plan()
    assert sorted(item.storage_index.offset[0] for item in plan.items) == [3, 4]
    assert all(item.lengths == torch.Size((1, 8, 6)) for item in plan.items)
