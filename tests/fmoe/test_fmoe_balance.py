"""`fmoe.balance` and `fmoe.utils`."""

import functools
import statistics

import pytest
import torch
from processes import needs_gloo, run

import fmoe
from fmoe.balance import metrics, reset_balance_profile, update_balance_profile
from fmoe.gates import GShardGate
from fmoe.utils import get_rank_0_in_comm, get_torch_default_comm


def by_hand(loads):
    return {
        "coefficient-variation": statistics.stdev(loads) / statistics.mean(loads),
        "Lmax-over-Lmin": (max(loads) + 1) / (min(loads) + 1),
        "Lmax-over-Lmean": max(loads) / statistics.mean(loads),
    }


def test_metrics():
    loads = [3.0, 0.0, 5.0, 1.0]
    assert {key: metric(torch.tensor(loads)).item() for key, metric in metrics.items()} == pytest.approx(by_hand(loads))


def test_a_profile_without_values():
    profile = {}
    reset_balance_profile(profile, 2, "gshard")
    assert profile == {key: [None, None] for key in (*metrics, "gshard_loss")}
    profile = {}
    reset_balance_profile(profile, 1, None)
    assert profile == {key: [None] for key in metrics}


def test_one_pass():
    profile = {}
    reset_balance_profile(profile, 3, "gshard")
    ids = torch.tensor([[0, 2], [2, -1], [2, 3], [-1, -1]])
    update_balance_profile(profile, ids, torch.rand(4, 2), torch.tensor(1.5), 1, 4, "gshard")
    for key, value in by_hand([1, 0, 3, 1]).items():
        assert profile[key][0] is profile[key][2] is None
        assert profile[key][1].item() == pytest.approx(value)
    assert profile["gshard_loss"] == [None, torch.tensor(1.5), None]


def test_as_a_gate_hook():
    profile, seen = {}, []
    layers = [fmoe.FMoETransformerMLP(3, 4, 8, gate=GShardGate) for _ in range(2)]
    reset_balance_profile(profile, len(layers), "gshard")

    def hook(ids, weights, context, layer_idx):
        seen.append(ids)
        update_balance_profile(profile, ids, weights, context, layer_idx, 3, "gshard")

    for layer_idx, layer in enumerate(layers):
        layer.gate_hook = functools.partial(hook, layer_idx=layer_idx)
        layer(torch.randn(9, 4))
    for layer_idx, ids in enumerate(seen):
        for key, value in by_hand([int((ids == e).sum()) for e in range(3)]).items():
            assert profile[key][layer_idx].item() == pytest.approx(value)
    assert profile["gshard_loss"] == [None, None]


@pytest.mark.parametrize("layer_idx", [-1, 2])
def test_a_layer_that_is_not_there(layer_idx):
    profile = {}
    with pytest.raises(ValueError, match="layer_idx must be below 0, the layers that reset_balance_profile"):
        update_balance_profile(profile, torch.zeros(1, 1, dtype=torch.int64), torch.ones(1, 1), None, 0, 4, None)
    reset_balance_profile(profile, 2, None)
    with pytest.raises(ValueError, match=f"below 2, .*, got {layer_idx}"):
        update_balance_profile(
            profile, torch.zeros(1, 1, dtype=torch.int64), torch.ones(1, 1), None, layer_idx, 4, None
        )


def groups_and_ranks():
    world = get_torch_default_comm()
    last = torch.distributed.new_group([1])
    mine = get_rank_0_in_comm(last) if torch.distributed.get_rank() == 1 else None
    return world.size(), get_rank_0_in_comm(world), get_rank_0_in_comm(None), mine


@needs_gloo
def test_groups():
    assert run(2, groups_and_ranks) == [(2, 0, 0, None), (2, 0, 0, 1)]


def test_no_group():
    with pytest.raises(RuntimeError, match="no group of all processes"):
        get_torch_default_comm()
