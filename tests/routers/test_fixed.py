"""The routers that look at nothing."""

import math

import pytest
import torch
from by_hand import MASKS, assert_refused, capacity_of, counted, serve

import fastmoe
from fastmoe.routers import RandomRouter, RoundRobinRouter, RoutingContext, ZeroRouter


def rows(routing, top_k):
    return routing.expert_ids_N.view(-1, top_k).tolist()


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("factor", [None, 0.6])
@pytest.mark.parametrize("top_k", [1, 2, 3])
@pytest.mark.parametrize("name", ["round_robin", "zero"])
def test_is_what_its_name_says(name, top_k, factor, mask):
    router = fastmoe.routers.get_router(name)(4, 5, top_k, capacity_factor=factor)
    who = counted(9, MASKS[mask])
    wished = [[-1] * top_k for _ in range(9)]
    for place, t in enumerate(who):
        wished[t] = [(place * top_k + k) % 5 if name == "round_robin" else k for k in range(top_k)]
    served = serve(wished, who, capacity_of(factor, len(who), top_k, 5) if factor else 9)
    routing = router(torch.randn(9, 4), RoutingContext(MASKS[mask]))
    assert rows(routing, top_k) == served
    assert routing.weights_N.tolist() == pytest.approx([1 / top_k] * (9 * top_k))
    assert int(routing.dropped) == sum(served[t].count(-1) for t in who)


def test_round_robin_is_even():
    counts = RoundRobinRouter(4, 5, 2)(torch.randn(50, 4)).expert_ids_N.bincount(minlength=5)
    assert counts.tolist() == [20] * 5


def test_random_draws_every_set_of_experts_equally_often():
    torch.manual_seed(0)
    num_tokens = 20_000
    chosen = RandomRouter(4, 5, 2)(torch.zeros(num_tokens, 4)).expert_ids_N.view(-1, 2)
    assert (chosen[:, 0] != chosen[:, 1]).all()
    pairs = torch.bincount(chosen[:, 0] * 5 + chosen[:, 1], minlength=25).view(5, 5)
    off_diagonal = pairs[~torch.eye(5, dtype=torch.bool)]
    spread = 5 * math.sqrt(num_tokens / 20)
    assert (off_diagonal - num_tokens / 20).abs().max() < spread


def test_random_follows_the_seed_and_draws_anew():
    router, x_TD = RandomRouter(4, 64, 2), torch.randn(50, 4)
    torch.manual_seed(3)
    first, second = rows(router(x_TD), 2), rows(router(x_TD), 2)
    torch.manual_seed(3)
    assert rows(router(x_TD), 2) == first != second
    assert rows(router.eval()(x_TD), 2) == second


@pytest.mark.parametrize("router", [RandomRouter(4, 3, 2), RoundRobinRouter(4, 3, 2), ZeroRouter(4, 3, 2)])
def test_nothing_to_learn_and_no_token(router):
    assert not list(router.parameters())
    routing = router(torch.randn(0, 4))
    assert (routing.expert_ids_N.shape, dict(routing.losses)) == ((0,), {})
    assert rows(router(torch.randn(2, 4), RoutingContext(torch.tensor([False, False]))), 2) == [[-1, -1]] * 2


@pytest.mark.parametrize("name", ["random", "round_robin", "zero"])
def test_experts_learn_under_it(name):
    layer = fastmoe.MoE(4, 3, 2, d_hidden=8, router=name, dtype=torch.bfloat16)
    y = layer(torch.randn(12, 4, dtype=torch.bfloat16))
    assert y.dtype == torch.bfloat16
    y.square().sum().backward()
    assert layer.experts.w1.grad.abs().sum() > 0


@pytest.mark.parametrize("name", ["random", "round_robin", "zero"])
def test_bad_options(name):
    assert_refused(name, 2, {"capacity_factor": 0}, "capacity_factor must be a number above 0 or None")
    assert_refused(name, 6, {}, "top_k must be at most num_experts")
    assert_refused(name, 2, {"aux_loss_weight": 0.1}, f"unknown option of router '{name}'")
