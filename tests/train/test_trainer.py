"""Steps, evaluation, and exact resumption."""

import math

import pytest
import torch
from tiny_run import change, make_trainer
from torch.distributed.checkpoint import FileSystemReader

from fastmoe.train import checkpoint
from fastmoe.train.loop import train


def never():
    return False


def losses(trainer):
    return trainer.history.losses, trainer.history.valid_losses, trainer.history.loads


@pytest.mark.parametrize("kind", ["dense", "moe"])
def test_a_resumed_run_has_exactly_the_losses_of_an_uninterrupted_one(tiny, tmp_path, kind):
    whole = make_trainer(tiny, kind)
    assert train([whole], [], never)

    stopped = change(tiny, run={"out": tmp_path / "stopped"})
    first = make_trainer(stopped, kind)
    assert not train([first], [], lambda: first.step == 7)
    second = make_trainer(stopped, kind)
    checkpoint.newest(second.folder, second.restore)
    assert second.step == 7
    torch.manual_seed(12345)
    assert train([second], [], never)

    assert losses(second) == losses(whole)
    assert len(whole.history.losses) == tiny.optim.steps
    assert whole.history.valid_steps == second.history.valid_steps == [0, 5, 10, 12]
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(tensor, second.model.state_dict()[name]), name


@pytest.mark.parametrize("kind", ["dense", "moe"])
def test_a_run_learns(tiny, kind):
    config = change(tiny, model={"dropout": 0.0}, optim={"steps": 60})
    trainer = make_trainer(config, kind)
    train([trainer], [], never)
    assert trainer.history.valid_losses[0] == pytest.approx(8, abs=0.3)
    assert trainer.history.valid_losses[-1] < 4


@pytest.mark.parametrize("kind", ["dense", "moe"])
def test_micro_steps_do_not_change_the_gradients(tiny, kind):
    tiny = change(tiny, model={"dropout": 0.0}, moe={"aux_loss_weight": 0.0})
    trainers = [make_trainer(change(tiny, optim={"grad_accumulation": n}), kind) for n in (1, 4)]
    for trainer in trainers:
        trainer.take_step()
        trainer.flush()
    one, four = trainers
    assert one.history.losses == pytest.approx(four.history.losses, rel=1e-6)
    assert one.grad_norm.item() == pytest.approx(four.grad_norm.item(), rel=1e-5)


def test_the_balance_loss_is_averaged_over_micro_steps(tiny):
    """With z-loss alone, a mean over tokens, the gradient must not depend on the number of micro-steps."""
    tiny = change(tiny, model={"dropout": 0.0}, moe={"aux_loss_weight": 0.0, "z_loss_weight": 10.0})
    norms = []
    for micro_steps in (1, 2, 4):
        trainer = make_trainer(change(tiny, optim={"grad_accumulation": micro_steps}))
        trainer.take_step()
        norms.append(trainer.grad_norm.item())
    assert norms == pytest.approx([norms[0]] * 3, rel=1e-5)
    unweighted = make_trainer(change(tiny, moe={"z_loss_weight": 0.0}))
    unweighted.take_step()
    assert abs(norms[0] / unweighted.grad_norm.item() - 1) > 0.01


def test_evaluation_changes_nothing(tiny):
    watched, plain = make_trainer(tiny), make_trainer(tiny)
    for trainer in (watched, plain):
        trainer.take_step()
    watched.evaluate()
    for trainer in (watched, plain):
        trainer.take_step()
        trainer.flush()
    assert watched.history.losses == plain.history.losses
    assert watched.model.training


def test_expert_load_is_a_share_of_rows_by_layer(tiny):
    trainer = make_trainer(tiny)
    assert trainer.expert_load() == []
    trainer.take_step()
    load = trainer.expert_load()
    assert [len(layer) for layer in load] == [4, 4]
    assert [sum(layer) for layer in load] == pytest.approx([1, 1])


def test_a_loss_that_is_not_finite_ends_the_run(tiny):
    trainer = make_trainer(tiny, "dense")
    with torch.no_grad():
        trainer.model.final_norm.weight.fill_(math.nan)
    trainer.take_step()
    with pytest.raises(FloatingPointError, match="dense: the loss is nan at step 1; try a smaller lr"):
        trainer.flush()


def test_a_checkpoint_holds_the_model_and_what_the_run_knows_of_itself(tiny):
    trainer = make_trainer(change(tiny, optim={"steps": 4}))
    train([trainer], [], never)
    path = trainer.folder / "step-00000004"
    saved = FileSystemReader(path).read_metadata().state_dict_metadata
    assert {name.removeprefix("model.") for name in saved if name.startswith("model.")} == {*trainer.model.state_dict()}
    extra = checkpoint.read_extra(path)
    assert (extra["kind"], extra["step"], extra["config"]["optim"]["steps"]) == ("moe", 4, 4)
    assert extra["history"] == trainer.history.to_plain()


@pytest.mark.parametrize(
    ("change_to", "message"),
    [
        ({"model": {"d_model": 32}}, "was trained with model = .* now"),
        ({"moe": {"num_experts": 8}}, "was trained with moe = .* now"),
        ({"data": {"path": "other.txt"}}, "was trained on other data than other.txt"),
    ],
)
def test_a_checkpoint_of_another_run_is_refused(tiny, tmp_path, change_to, message):
    trainer = make_trainer(change(tiny, optim={"steps": 4}))
    train([trainer], [], never)
    if "data" in change_to:
        other = tmp_path / "other.txt"
        other.write_bytes(b"other data " * 500)
        change_to = {"data": {"path": other}}
    another = make_trainer(change(tiny, **change_to))
    with pytest.raises(ValueError, match=message):
        checkpoint.newest(another.folder, another.restore)


def test_data_that_was_damaged_on_the_disk_is_found_out(tiny):
    trainer = make_trainer(tiny)
    train([trainer], [], never)
    data = trainer.folder / "step-00000012" / "__0_0.distcp"
    content = data.read_bytes()
    data.write_bytes(content[: len(content) // 2] + bytes(len(content) - len(content) // 2))
    another = make_trainer(tiny)
    with pytest.warns(UserWarning, match="step-00000012 cannot be read"):
        checkpoint.newest(another.folder, another.restore)
    assert another.step == 8


def test_a_resumed_run_may_be_longer_and_have_other_optimizer_options(tiny):
    train([make_trainer(tiny)], [], never)
    longer = make_trainer(change(tiny, optim={"steps": 16, "weight_decay": 0.5}))
    checkpoint.newest(longer.folder, longer.restore)
    assert train([longer], [], never)
    assert longer.step == 16
    assert longer.optimizer.param_groups[0]["weight_decay"] == 0.5


@pytest.mark.parametrize(
    ("change_to", "message"),
    [
        ({"optim": {"batch_size": 3}}, "batch_size must be a multiple"),
        ({"model": {"block_size": 5000}}, "held-out part"),
    ],
)
def test_what_the_data_cannot_give_is_refused_at_once(tiny, change_to, message):
    with pytest.raises(ValueError, match=message):
        make_trainer(change(tiny, **change_to))
