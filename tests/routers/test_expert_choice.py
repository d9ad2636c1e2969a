"""Expert choice against Zhou et al. 2022, section 3.2, expert by expert."""

import pytest
import torch
from by_hand import (
    MASKS,
    assert_learns,
    assert_refused,
    assert_same,
    assert_silent_on_no_token,
    capacity_of,
    counted,
    linear,
    softmax,
    tokens,
)

import fastmoe
from fastmoe.routers import ExpertChoiceRouter, RoutingContext


def by_hand(router, x_TD, mask_T):
    """For each expert the tokens it takes; then ids and weights row by row, those left free included."""
    who, E, K, T = counted(len(x_TD), mask_T), router.num_experts, router.top_k, len(x_TD)
    scores = [softmax(row) for row in linear(router.proj.weight, x_TD)]
    size = capacity_of(router.capacity_factor, len(who), K, E)
    rows = min(capacity_of(router.capacity_factor, T, K, E), T)
    taken = [sorted(who, key=lambda t: -scores[t][e].item())[:size] for e in range(E)]
    free = [rows - len(row) for row in taken]
    ids = [[e] * len(taken[e]) + [-1] * free[e] for e in range(E)]
    weights = [[scores[t][e] for t in taken[e]] + [torch.zeros(())] * free[e] for e in range(E)]
    return taken, ids, weights


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("factor", [0.3, 1.0, 1.7, 9.0])
@pytest.mark.parametrize(("num_experts", "top_k"), [(5, 2), (5, 1), (3, 3), (1, 1)])
def test_is_the_paper(num_experts, top_k, factor, mask, training):
    router = ExpertChoiceRouter(4, num_experts, top_k, capacity_factor=factor)
    torch.nn.init.normal_(router.proj.weight)
    router, x_TD = router.double().train(training), tokens()
    taken, ids, weights = by_hand(router, x_TD, MASKS[mask])
    routing = assert_same(router, x_TD, MASKS[mask], ids, weights, {})
    assert routing.token_ids_N[routing.expert_ids_N >= 0].tolist() == [t for row in taken for t in row]
    assert (routing.dropped, routing.demand_E, routing.rows_per_token) == (0, None, 0)


def test_earlier_tokens_first_among_equals():
    router = ExpertChoiceRouter(4, 3, 1)
    mask_T = torch.arange(100) >= 10
    routing = router(torch.ones(100, 4), RoutingContext(mask_T))
    taken_N = routing.expert_ids_N >= 0
    assert routing.token_ids_N[taken_N].tolist() == [*range(10, 40)] * 3
    assert routing.expert_ids_N[taken_N].tolist() == [0] * 30 + [1] * 30 + [2] * 30


def test_every_expert_computes_its_capacity():
    layer = fastmoe.MoE(8, 4, 2, d_hidden=4, router="expert_choice", router_options={"capacity_factor": 1.5})
    layer(torch.randn(3, 11, 8))
    assert fastmoe.stats(layer)[""].counts.tolist() == [25] * 4


def test_no_token():
    assert_silent_on_no_token(ExpertChoiceRouter(4, 3).double())


@pytest.mark.parametrize("top_k", [1, 2])
def test_learns(top_k):
    assert_learns("expert_choice", top_k)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"capacity_factor": 0}, "capacity_factor must be above 0, got 0"),
        ({"capacity_factor": -1}, "capacity_factor must be a finite number >= 0"),
        ({"capacity_factor": None}, "capacity_factor must be a finite number >= 0"),
        ({"stats_scope": "world"}, "unknown stats_scope 'world'"),
        ({"drop_by": "weight"}, "unknown option of router 'expert_choice' 'drop_by'"),
    ],
)
def test_bad_options(options, message):
    assert_refused("expert_choice", 2, options, message)
