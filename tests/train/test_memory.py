"""Memory over steps, checkpoints and resumed runs."""

import os
from pathlib import Path

import pytest
import torch
from tiny_run import LSTM, change, make_trainer

from fastmoe.train import checkpoint
from fastmoe.train.batches import Share
from fastmoe.train.loop import train
from fastmoe.train.memory import Memories

ARCHITECTURES = {
    "lstm": LSTM,
    "transformer_xl": {"arch": "transformer_xl", "model_options": {"memory_length": 16}},
}


@pytest.fixture(params=ARCHITECTURES)
def remembering(request, tiny):
    return change(tiny, model=ARCHITECTURES[request.param])


def never():
    return False


def losses(trainer):
    return trainer.history.losses, trainer.history.valid_losses, trainer.history.loads


def memory_files(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*.pt"))


def files_of(steps):
    return [f"step-{step:08d}/memory/{part}.pt" for step in steps for part in (0, 1)]


@pytest.mark.parametrize("kind", ["dense", "moe"])
def test_a_resumed_run_goes_on_with_its_memory_exactly(remembering, tmp_path, kind):
    whole = make_trainer(remembering, kind)
    assert train([whole], [], never)

    stopped = change(remembering, run={"out": tmp_path / "stopped"})
    first = make_trainer(stopped, kind)
    assert not train([first], [], lambda: first.step == 7)
    assert memory_files(first.folder) == files_of((4, 7))
    second = make_trainer(stopped, kind)
    checkpoint.newest(second.folder, second.restore)
    torch.manual_seed(12345)
    assert train([second], [], never)

    assert losses(second) == losses(whole)
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(tensor, second.model.state_dict()[name]), name
    assert memory_files(second.folder) == files_of((8, 12))


def test_memory_carries_over(remembering):
    """The second step's loss depends on whether the model remembers the first."""
    remembering = change(remembering, model={"dropout": 0.0})
    trainers = [make_trainer(remembering), make_trainer(remembering)]
    for trainer in trainers:
        trainer.take_step()
    trainers[1].memory.values = [None, None]
    for trainer in trainers:
        trainer.take_step()
        trainer.flush()
    assert trainers[0].history.losses[0] == trainers[1].history.losses[0]
    assert trainers[0].history.losses[1] != trainers[1].history.losses[1]


@pytest.mark.parametrize("damage", ["missing", "cut", "empty", "text"])
def test_a_checkpoint_without_its_memory_is_passed_over(tiny, damage):
    tiny = change(tiny, model=ARCHITECTURES["lstm"])
    train([make_trainer(tiny)], [], never)
    another = make_trainer(tiny)
    file = another.folder / "step-00000012" / "memory" / "1.pt"
    whole = file.read_bytes()
    file.write_bytes({"cut": whole[: len(whole) // 2], "empty": b"", "text": b"no tensor"}.get(damage, b""))
    if damage == "missing":
        file.unlink()
    with pytest.warns(UserWarning, match=r"step-00000012 cannot be read.*memory/1.pt cannot be read"):
        checkpoint.newest(another.folder, another.restore)
    assert another.step == 8


def test_after_passing_over_the_newest_checkpoint_new_ones_stay(tiny):
    tiny = change(tiny, model=ARCHITECTURES["lstm"], run={"keep_checkpoints": 1, "checkpoint_every": 4})
    first = make_trainer(change(tiny, run={"keep_checkpoints": 2}))
    train([first], [], never)
    (first.folder / "step-00000012" / "memory" / "0.pt").unlink()
    another = make_trainer(change(tiny, run={"checkpoint_every": 2}))
    with pytest.warns(UserWarning, match="step-00000012 cannot be read"):
        checkpoint.newest(another.folder, another.restore)
    assert not train([another], [], lambda: another.step == 10)
    assert [path.name for path in checkpoint.checkpoints(another.folder)] == ["step-00000010"]
    checkpoint.newest(another.folder, make_trainer(tiny).restore)


def test_a_kill_between_checkpoint_and_memory_loses_neither(remembering, monkeypatch):
    first = make_trainer(remembering)
    monkeypatch.setattr(checkpoint, "take_memory", lambda path: None)
    assert not train([first], [], lambda: first.step == 6)
    assert (first.folder / "step-00000006.memory" / "0.pt").is_file()
    second = make_trainer(remembering)
    checkpoint.newest(second.folder, second.restore)
    for mine, theirs in zip(second.memory.values, first.memory.values, strict=True):
        assert torch.equal(mine, theirs)


def test_a_kill_while_memory_is_written_leaves_the_checkpoint_before(remembering, monkeypatch):
    first = make_trainer(remembering)
    assert not train([first], [], lambda: first.step == 4)
    first.take_step()
    monkeypatch.setattr(torch, "save", lambda value, file: file.write(b"half") and 1 / 0)
    with pytest.raises(ZeroDivisionError):
        first.save()
    second = make_trainer(remembering)
    checkpoint.newest(second.folder, second.restore)
    assert second.step == 4


def test_memory_is_on_the_disk_before_its_checkpoint(remembering, monkeypatch):
    trainer = make_trainer(remembering)
    trainer.take_step()
    synced, sync = [], os.fsync
    monkeypatch.setattr(
        os, "fsync", lambda number: synced.append(os.readlink(f"/proc/self/fd/{number}")) or sync(number)
    )
    trainer.memory.save(trainer.folder / "step-00000001")
    assert [Path(path).name for path in synced] == ["0.pt", "1.pt", "step-00000001.memory"]


def test_other_micro_steps_take_over_the_memory(remembering):
    """4 rows in 2 micro-steps, then in 4."""
    trainer = make_trainer(remembering)
    train([trainer], [], never)
    another = make_trainer(change(remembering, optim={"grad_accumulation": 4, "steps": 16}))
    checkpoint.newest(another.folder, another.restore)
    assert [value.shape[1] for value in another.memory.values] == [1] * 4
    assert torch.equal(torch.cat(another.memory.values, 1), torch.cat(trainer.memory.values, 1))


@pytest.mark.parametrize(("saved_by", "needed_by"), [((2, 1), (1, 2)), ((1, 2), (2, 1)), ((4, 1), (1, 2))])
def test_each_process_gets_its_rows(tmp_path, saved_by, needed_by):
    """(micro-steps, processes) before and after."""
    rows = torch.arange(8.0).view(1, 8, 1)
    path = tmp_path / "step-00000001"
    for rank in range(saved_by[1]):
        memory = Memories(saved_by[0], rank, saved_by[1])
        for micro_step in range(saved_by[0]):
            memory.values[micro_step] = rows[:, Share(micro_step, saved_by[0], rank, saved_by[1]).of(torch.arange(8))]
        memory.save(path)
    for rank in range(needed_by[1]):
        memory = Memories(needed_by[0], rank, needed_by[1])
        memory.restore(path, saved_by[0] * saved_by[1], torch.device("cpu"))
        for micro_step in range(needed_by[0]):
            wanted = Share(micro_step, needed_by[0], rank, needed_by[1]).of(torch.arange(8.0))
            assert torch.equal(memory.values[micro_step].flatten(), wanted)


def test_restoring_no_memory_forgets(tmp_path):
    memory = Memories(1, 0, 1)
    memory.values = [torch.ones(1, 2, 3)]
    memory.restore(tmp_path / "step-00000000", 0, torch.device("cpu"))
    assert memory.values == [None]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"optim": {"batch_size": 8}}, "was trained with batch_size = 4; got batch_size = 8"),
        ({"run": {"seed": 77}}, "was trained with seed = 1; got seed = 77"),
    ],
)
def test_another_order_of_the_data_is_refused(tiny, changes, message):
    train([make_trainer(tiny)], [], never)
    another = make_trainer(change(tiny, **changes))
    with pytest.raises(checkpoint.OtherRunError, match=message):
        checkpoint.newest(another.folder, another.restore)
