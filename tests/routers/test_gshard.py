"""GShard's gating against Lepikhin et al. 2020, algorithm 1, token by token."""

import math

import pytest
import torch
from by_hand import (
    MASKS,
    assert_learns,
    assert_refused,
    assert_same,
    assert_silent_on_no_token,
    balance,
    best,
    capacity_of,
    counted,
    linear,
    serve,
    softmax,
    tokens,
)

from fastmoe.routers import GShardRouter, noise


def by_hand(router, x_TD, mask_T, noise_T, factor):
    who, E = counted(len(x_TD), mask_T), router.num_experts
    probs = [softmax(row) for row in linear(router.proj.weight, x_TD)]
    ids = [best(row, 2) for row in probs]
    weights = [[row[e] / (row[a] + row[b]) for e in (a, b)] for row, (a, b) in zip(probs, ids, strict=True)]
    served = serve(ids, who, capacity_of(factor, len(who), 2, E))
    dropped = sum(row.count(-1) for t, row in enumerate(served) if t in who)
    if router.training:
        for row, (_, g2), u in zip(served, weights, noise_T, strict=True):
            if not 2 * g2 > u:
                row[1] = -1
    losses = {"load_balance": 0.5 * balance(probs, [a for a, _ in ids], who)}
    return served, weights, losses, dropped


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("factor", [0.5, 1.0, 4.0])
@pytest.mark.parametrize("num_experts", [5, 2])
def test_is_algorithm_1(monkeypatch, num_experts, factor, mask, training):
    noise_T = torch.rand(9, dtype=torch.float64)
    monkeypatch.setattr(noise, "uniform", lambda like: noise_T)
    router = GShardRouter(4, num_experts, aux_loss_weight=0.5, capacity_factor=factor, eval_capacity_factor=None)
    torch.nn.init.normal_(router.proj.weight)
    router, x_TD = router.double().train(training), tokens()
    *expected, dropped = by_hand(router, x_TD, MASKS[mask], noise_T, factor)
    assert int(assert_same(router, x_TD, MASKS[mask], *expected).dropped) == dropped


def test_defaults_are_the_papers():
    router = GShardRouter(4, 3)
    assert (router.capacity_factor, router.eval_capacity_factor, router.top_k) == (1.0, 2.0, 2)
    assert GShardRouter(4, 3, capacity_factor=None).capacity_factor is None


def test_a_skipped_choice_keeps_its_place(monkeypatch):
    """Two tokens want expert 1 second, which takes one row: the first is skipped, the second still finds it full."""
    monkeypatch.setattr(noise, "uniform", lambda like: torch.tensor([0.99, 0.0]))
    router = GShardRouter(4, 4, capacity_factor=0.25, min_capacity=1)
    router.proj.weight.data = torch.diag(torch.tensor([4.0, 2.0, 4.0, 0.0]))
    routing = router(torch.tensor([[1.0, 1.0, 0.0, 0.0], [0.0, 1.0, 1.0, 0.0]]))
    assert routing.expert_ids_N.tolist() == [0, -1, 2, -1]
    assert int(routing.dropped) == 1
    assert routing.demand_E.tolist() == [1, 2, 1, 0]


def test_second_expert_is_kept_as_often_as_it_matters():
    for margin in (0.0, 1.0, 2.0, 4.0):
        router = GShardRouter(1, 2, capacity_factor=None)
        router.proj.weight.data = torch.tensor([[margin], [0.0]])
        kept_T = router(torch.ones(20_000, 1)).expert_ids_N.view(-1, 2)[:, 1] >= 0
        chance = min(1, 2 / (1 + math.exp(margin)))
        assert abs(kept_T.float().mean().item() - chance) <= 5 * math.sqrt(chance * (1 - chance) / 20_000) + 1e-9
        assert (router.eval()(torch.ones(50, 1)).expert_ids_N >= 0).all()


def test_no_token():
    assert_silent_on_no_token(GShardRouter(4, 3).double())


def test_even_load_is_the_weight():
    router = GShardRouter(4, 4, aux_loss_weight=0.25)
    router.proj.weight.data = torch.eye(4)
    assert router(torch.eye(4)).losses["load_balance"].item() == pytest.approx(0.25, rel=1e-6)


def test_learns():
    assert_learns("gshard", 2)


@pytest.mark.parametrize(
    ("top_k", "options", "message"),
    [
        (1, {}, "give top_k=2, got top_k=1"),
        (3, {}, "give top_k=2, got top_k=3"),
        (2, {"aux_loss_weight": -1}, "aux_loss_weight must be a finite number >= 0"),
        (2, {"capacity_factor": 0}, "capacity_factor must be a number above 0 or None"),
        (2, {"jitter": 0.1}, "unknown option of router 'gshard' 'jitter'"),
    ],
)
def test_bad_options(top_k, options, message):
    assert_refused("gshard", top_k, options, message)
