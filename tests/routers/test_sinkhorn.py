"""Sinkhorn routing against Clark et al. 2022, section 3.1, with loops over tokens and experts."""

import math

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
    serve,
    softmax,
    tokens,
)

from fastmoe.routers import RoutingContext, SinkhornRouter


def plan(logits, temperature, num_iterations):
    """Rows of mass 1/T and columns of mass 1/E, by scaling them in turn."""
    T, E = len(logits), len(logits[0])
    mass = [[math.exp(v.item() / temperature) for v in row] for row in logits]
    for _ in range(num_iterations):
        mass = [[m / sum(row) / T for m in row] for row in mass]
        columns = [sum(row[e] for row in mass) for e in range(E)]
        mass = [[row[e] / columns[e] / E for e in range(E)] for row in mass]
    return mass


def by_hand(router, x_TD, mask_T, score_function):
    who, E, K = counted(len(x_TD), mask_T), router.num_experts, router.top_k
    logits = linear(router.proj.weight, x_TD)
    scores = [softmax(row) if score_function == "softmax" else [1 / (1 + (-v).exp()) for v in row] for row in logits]
    wants = {t: logits[t] for t in who}
    if router.training:
        masses = plan([logits[t] for t in who], router.temperature, router.num_iterations)
        wants = {t: torch.tensor(row, dtype=torch.float64) for t, row in zip(who, masses, strict=True)}
    ids = [best(wants[t], K) if t in who else [-1] * K for t in range(len(x_TD))]
    weights = [[row[e] for e in chosen] for row, chosen in zip(scores, ids, strict=True)]
    if router.capacity_factor is None:
        return ids, weights, {}
    return serve(ids, who, capacity_of(router.capacity_factor, len(who), K, E)), weights, {}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("options", [{}, {"num_iterations": 1, "temperature": 0.5}, {"capacity_factor": 0.5}])
@pytest.mark.parametrize("score_function", ["softmax", "sigmoid", None])
@pytest.mark.parametrize(("num_experts", "top_k"), [(5, 1), (5, 2), (3, 3), (1, 1)])
def test_is_the_paper(num_experts, top_k, score_function, options, mask, training):
    router = SinkhornRouter(4, num_experts, top_k, score_function=score_function, **options)
    torch.nn.init.normal_(router.proj.weight, std=2)
    router, x_TD = router.double().train(training), tokens()
    used = score_function or ("sigmoid" if top_k == 1 else "softmax")
    assert_same(router, x_TD, MASKS[mask], *by_hand(router, x_TD, MASKS[mask], used))


def test_load_is_about_even_in_training():
    router, x_TD = SinkhornRouter(8, 4, temperature=0.05, num_iterations=300), torch.randn(4000, 8) + 1
    train_E, eval_E = (router.train(on)(x_TD).expert_ids_N.bincount(minlength=4) for on in (True, False))
    assert (train_E - 1000).abs().max() < 100
    assert (eval_E - 1000).abs().max() > 200


def test_large_logits_are_no_trouble():
    router = SinkhornRouter(4, 3, temperature=1e-3)
    torch.nn.init.normal_(router.proj.weight, std=100)
    ids_T = router(torch.randn(300, 4)).expert_ids_N
    assert ids_T.bincount(minlength=3).min() > 0


def test_rubbish_in_padding_moves_no_choice():
    router, x_TD, mask_T = SinkhornRouter(4, 3, 2).double(), tokens().detach(), MASKS["padded"]
    ids_N = router(x_TD, RoutingContext(mask_T)).expert_ids_N
    x_TD[~mask_T] = 1e3
    assert torch.equal(router(x_TD, RoutingContext(mask_T)).expert_ids_N, ids_N)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("options", [{}, {"capacity_factor": 1.0}])
def test_no_token(training, options):
    assert_silent_on_no_token(SinkhornRouter(4, 3, 2, **options).double().train(training))


@pytest.mark.parametrize("top_k", [1, 2])
def test_learns(top_k):
    assert_learns("sinkhorn", top_k)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_iterations": 0}, "num_iterations must be a whole number >= 1"),
        ({"temperature": 0}, "temperature must be above 0, got 0"),
        ({"temperature": -1}, "temperature must be a finite number >= 0"),
        ({"score_function": "tanh"}, "unknown score_function 'tanh'"),
        ({"capacity_factor": 0}, "capacity_factor must be a number above 0 or None"),
    ],
)
def test_bad_options(options, message):
    assert_refused("sinkhorn", 1, options, message)
