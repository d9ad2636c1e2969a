"""SWIPE against a loop over choices and tokens."""

import math
from collections import Counter

import pytest
import torch
from by_hand import (
    MASKS,
    assert_learns,
    assert_refused,
    assert_same,
    assert_silent_on_no_token,
    best,
    capacity_of,
    counted,
    linear,
    softmax,
    tokens,
)

from fastmoe.routers import RoutingContext, SwipeRouter


def by_hand(router, x_TD, mask_T, factor):
    who, E, K, T = counted(len(x_TD), mask_T), router.num_experts, router.top_k, len(x_TD)
    probs = [softmax(row) for row in linear(router.proj.weight, x_TD)]
    wishes = Counter(e for t in who for e in best(probs[t], K))
    room = [T if factor is None else capacity_of(factor, len(who), K, E)] * E
    ids = [[-1] * K for _ in range(T)]
    for k in range(K):
        for t in who:
            for e in best(probs[t], E):
                if room[e] > 0 and e not in ids[t]:
                    ids[t][k], room[e] = e, room[e] - 1
                    break
    weights = []
    for row, got in zip(probs, ids, strict=True):
        total = 1 if K == 1 else sum(row[e] for e in got if e >= 0)
        weights.append([row[e] / total if e >= 0 else torch.zeros(()) for e in got])
    shares = [wishes[e] / (len(who) * K) for e in range(E)]
    means = [sum(probs[t][e] for t in who) / len(who) for e in range(E)]
    losses = {"load_balance": 0.5 * E * sum(f * p for f, p in zip(shares, means, strict=True))}
    dropped = sum(ids[t].count(-1) for t in who)
    return ids, weights, losses, dropped, [wishes[e] for e in range(E)]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("factor", [0.3, 0.7, 1.0, 1.4, None])
@pytest.mark.parametrize(("num_experts", "top_k"), [(5, 1), (5, 2), (6, 4), (3, 3), (1, 1)])
def test_is_its_definition(num_experts, top_k, factor, mask, training):
    router = SwipeRouter(4, num_experts, top_k, aux_loss_weight=0.5, capacity_factor=factor)
    torch.nn.init.normal_(router.proj.weight)
    router.proj.weight.data[0] *= 2
    router, x_TD = router.double().train(training), tokens()
    *expected, dropped, demand = by_hand(router, x_TD, MASKS[mask], factor)
    routing = assert_same(router, x_TD, MASKS[mask], *expected)
    assert int(routing.dropped) == dropped
    if factor is not None:
        assert routing.demand_E.tolist() == demand


def test_surplus_takes_room_from_a_later_first_choice():
    """Experts take one row each: token 1 finds 0 full and takes 1, which token 2 wanted first."""
    router = SwipeRouter(3, 3, 1)
    router.proj.weight.data = torch.eye(3)
    routing = router(torch.tensor([[2.0, 1.0, 0.0], [2.0, 1.0, 0.0], [0.0, 2.0, 1.0]]))
    assert routing.expert_ids_N.tolist() == [0, 1, 2]
    assert routing.demand_E.tolist() == [2, 1, 0]
    assert int(routing.dropped) == 0


def test_capacity_of_evaluation():
    router = SwipeRouter(4, 3)
    assert (router.capacity_factor, router.eval_capacity_factor, router.aux_loss_weight) == (1.0, 1.0, 0.0)
    router = SwipeRouter(4, 3, eval_capacity_factor=math.inf).eval()
    x_TD = torch.randn(50, 4)
    assert torch.equal(router(x_TD).expert_ids_N.view(50, 2), router.proj(x_TD).topk(2).indices)


def test_a_weight_of_zero_is_no_nan():
    """Softmax gives the second expert exactly 0, which is all that the second token can have."""
    router = SwipeRouter(2, 2, 2, capacity_factor=0.5)
    router.proj.weight.data = torch.tensor([[1e3, 0.0], [0.0, 0.0]])
    x_TD = torch.tensor([[1.0, 0.0], [1.0, 0.0]], requires_grad=True)
    routing = router(x_TD)
    assert routing.expert_ids_N.tolist() == [0, -1, 1, -1]
    assert routing.weights_N.tolist() == [1, 0, 0, 0]
    routing.weights_N.sum().backward()
    assert x_TD.grad.isfinite().all()


def test_even_load_is_the_weight():
    router = SwipeRouter(4, 4, 1, aux_loss_weight=0.25)
    router.proj.weight.data = torch.eye(4)
    assert router(torch.eye(4)).losses["load_balance"].item() == pytest.approx(0.25, rel=1e-6)


@pytest.mark.parametrize("training", [True, False])
def test_no_token(training):
    router = SwipeRouter(4, 3, aux_loss_weight=0.5).double().train(training)
    assert_silent_on_no_token(router)
    assert int(router(tokens(3), RoutingContext(torch.zeros(3, dtype=torch.bool))).dropped) == 0


@pytest.mark.parametrize("top_k", [1, 2])
def test_learns(top_k):
    assert_learns("swipe", top_k)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"drop_by": "weight"}, "serves tokens by position: leave drop_by out, got 'weight'"),
        ({"drop_by": "age"}, "unknown drop_by 'age'"),
        ({"aux_loss_weight": -1}, "aux_loss_weight must be a finite number >= 0"),
        ({"capacity_factor": 0}, "capacity_factor must be a number above 0 or None"),
    ],
)
def test_bad_options(options, message):
    assert_refused("swipe", 2, options, message)


def test_nan_shows():
    x_TD = torch.randn(4, 4)
    x_TD[1] = torch.nan
    routing = SwipeRouter(4, 4, 2)(x_TD)
    assert routing.weights_N.view(4, 2).isnan().any(1).tolist() == [False, True, False, False]
    assert routing.expert_ids_N.view(4, 2)[1].min() >= 0
