"""What can be saved, and what fits what is loaded."""

import pytest
import torch
from checkpoint_cases import assert_same, build, optimizer_of, trained
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from fastmoe import load, save


@pytest.fixture(scope="module")
def single(tmp_path_factory):
    path = tmp_path_factory.mktemp("checkpoints") / "single"
    save(*trained(), path)
    return path


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        ({"a": [1, {"b": torch.zeros(1)}]}, r"extra\['a'\]\[1\]\['b'\] must be a plain value .*, got Tensor"),
        ({"a": (1, 2)}, r"extra\['a'\] must be a plain value .*, got tuple"),
        ({1: 2}, "the keys of extra must be strings, got 1"),
    ],
)
def test_extra_is_plain(tmp_path, extra, words):
    with pytest.raises(ValueError, match=words):
        save(nn.Linear(2, 2), None, tmp_path / "one", extra=extra)
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_saved(tmp_path):
    model, optimizer = trained()

    class Extra(nn.Module):
        def get_extra_state(self):
            return {}

    with pytest.raises(ValueError, match=r"'0\._extra_state' of the state_dict must be a parameter or a buffer"):
        save(nn.Sequential(Extra()), None, tmp_path / "one")
    with pytest.raises(ValueError, match=r"parameter 0 of the optimizer's group 0, of shape .* not one of the model's"):
        save(model, optimizer_of(build()), tmp_path / "one")
    with pytest.raises(ValueError, match="is on the meta device"):
        save(model.to("meta"), None, tmp_path / "one")
    model, optimizer = trained()
    optimizer.param_groups[1]["lr"] = torch.zeros(2)
    with pytest.raises(ValueError, match="'lr' of the optimizer's group 1 must be a plain value"):
        save(model, optimizer, tmp_path / "one")
    assert not list(tmp_path.iterdir())


def test_groups_and_dtypes_must_agree(single):
    model = build()
    with pytest.raises(ValueError, match="the number of the optimizer's parameter groups: 1 here, 2 in the checkpoint"):
        load(model, torch.optim.AdamW(model.parameters()), single)
    groups = [group["params"] for group in optimizer_of(model).param_groups]
    moved = torch.optim.AdamW([{"params": groups[0][1:]}, {"params": [groups[0][0], *groups[1]]}])
    with pytest.raises(
        ValueError, match=r"in another group of the optimizer: first.weight: 1 here, 0 in the checkpoint"
    ):
        load(model, moved, single)
    with pytest.raises(ValueError, match=r"dtypes that differ .*: first.bias: torch.float32 here, torch.float64 in"):
        load(build().float(), None, single)


def test_options_of_the_groups(tmp_path):
    """Those of the checkpoint; a tensor stays the tensor that a scheduler holds, a tuple a tuple."""
    model = build()
    optimizer = torch.optim.AdamW(model.parameters(), lr=torch.tensor(0.25), betas=(0.5, 0.75), weight_decay=0.5)
    torch.optim.lr_scheduler.StepLR(optimizer, 1)
    save(model, optimizer, tmp_path / "one")
    lr = torch.tensor(9.0)
    other = torch.optim.AdamW(model.parameters(), lr=lr)
    load(model, other, tmp_path / "one")
    group = other.param_groups[0]
    assert group["lr"] is lr
    assert lr == 0.25
    assert group["betas"] == (0.5, 0.75)
    assert group["weight_decay"] == 0.5
    assert group["initial_lr"] == 0.25
    assert not other.state


def test_no_optimizer_state_replaces_state(tmp_path):
    """An optimizer that has taken steps is set back to one that had taken none."""
    model = build()
    save(model, optimizer_of(model), tmp_path / "one")
    model, optimizer = trained()
    load(model, optimizer, tmp_path / "one")
    assert not optimizer.state


class Compiled(nn.Module):
    """A wrapper as `torch.compile` makes one."""

    def __init__(self, model):
        super().__init__()
        self._orig_mod = model


def test_compiling_leaves_names_alone(tmp_path, single):
    save(Compiled(trained()[0]), None, tmp_path / "one")
    for path in (single, tmp_path / "one"):
        model = build(seed=3)
        load(Compiled(model), None, path)
        assert_same(dict(model.state_dict()), dict(trained()[0].state_dict()))


def test_activation_checkpointing_leaves_names_alone(single):
    model = build(seed=3)
    model.stacked, model.listed = checkpoint_wrapper(model.stacked), checkpoint_wrapper(model.listed)
    load(model, None, single)
    assert_same(dict(model.state_dict()), dict(trained()[0].state_dict()))
    wrong = build(stacked=4)
    wrong.stacked = checkpoint_wrapper(wrong.stacked)
    with pytest.raises(ValueError, match="layer 'stacked' has 4 experts, the checkpoint 5"):
        load(wrong, None, single)
