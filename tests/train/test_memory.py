"""Memory over steps, checkpoints and resumed runs."""

import pytest
import torch
from tiny_run import LSTM, change, make_trainer

from fastmoe.train import checkpoint
from fastmoe.train.loop import train

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
    return sorted(path.name for path in folder.glob("memory-*"))


@pytest.mark.parametrize("kind", ["dense", "moe"])
def test_a_resumed_run_goes_on_with_its_memory_exactly(remembering, tmp_path, kind):
    whole = make_trainer(remembering, kind)
    assert train([whole], [], never)

    stopped = change(remembering, run={"out": tmp_path / "stopped"})
    first = make_trainer(stopped, kind)
    assert not train([first], [], lambda: first.step == 7)
    assert memory_files(first.folder) == [f"memory-{step:08d}-{part}.pt" for step in (4, 7) for part in (0, 1)]
    second = make_trainer(stopped, kind)
    checkpoint.newest(second.folder, second.restore)
    torch.manual_seed(12345)
    assert train([second], [], never)

    assert losses(second) == losses(whole)
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(tensor, second.model.state_dict()[name]), name
    assert memory_files(second.folder) == [f"memory-{step:08d}-{part}.pt" for step in (8, 12) for part in (0, 1)]


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


def test_a_checkpoint_without_its_memory_is_passed_over(tiny):
    tiny = change(tiny, model=ARCHITECTURES["lstm"])
    train([make_trainer(tiny)], [], never)
    another = make_trainer(tiny)
    (another.folder / "memory-00000012-1.pt").unlink()
    with pytest.warns(UserWarning, match=r"step-00000012 cannot be read.*memory-00000012-1.pt cannot be read"):
        checkpoint.newest(another.folder, another.restore)
    assert another.step == 8


def test_memory_that_is_needed_in_other_parts_starts_empty_and_says_so(tiny):
    tiny = change(tiny, model=ARCHITECTURES["lstm"])
    train([make_trainer(tiny)], [], never)
    another = make_trainer(change(tiny, optim={"grad_accumulation": 4, "steps": 16}))
    with pytest.warns(UserWarning, match=r"saved in 2 parts and is needed in 4 .*: it starts empty"):
        checkpoint.newest(another.folder, another.restore)
    assert another.memory.values == [None] * 4
