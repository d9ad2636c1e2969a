"""Noisy top-k gating against Shazeer et al. 2017, equations 3 to 11, token by token."""

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
    one_plus_cv_squared,
    serve,
    softmax,
    tokens,
)

import fastmoe
from fastmoe.routers import NoisyTopKRouter, noise
from fastmoe.routers.noisy_topk import chance_of_choice


def drawn(router):
    """The router in float64 with other weights than zero."""
    for p in router.parameters():
        torch.nn.init.normal_(p)
    return router.double()


def by_hand(router, x_TD, mask_T, noise_TE, factor):
    who, K, E = counted(len(x_TD), mask_T), router.top_k, router.num_experts
    clean = linear(router.proj.weight, x_TD)
    std = [[(1 + v.exp()).log() for v in row] for row in linear(router.noise.weight, x_TD)]
    noisy = clean
    if router.training:
        noisy = [[c + n * s for c, n, s in zip(*rows, strict=True)] for rows in zip(clean, noise_TE, std, strict=True)]
    ids = [best(row, K) for row in noisy]
    weights = [softmax([row[e] for e in chosen]) for row, chosen in zip(noisy, ids, strict=True)]
    if K == 1:
        weights = [[softmax(row)[chosen[0]]] for row, chosen in zip(noisy, ids, strict=True)]
    importance, load = [0.0] * E, [0.0] * E
    for t in who:
        for e, w in zip(ids[t], weights[t], strict=True):
            importance[e] = importance[e] + w
        for e in range(E):
            others = sorted((noisy[t][i] for i in range(E) if i != e), key=lambda v: -v.item())
            chance = 1.0
            if K < E:
                chance = (1 + torch.erf((clean[t][e] - others[K - 1]) / std[t][e] / math.sqrt(2))) / 2
            load[e] = load[e] + chance
    losses = {"importance": 0.3 * one_plus_cv_squared(importance)}
    if router.training:
        losses["load"] = torch.as_tensor(0.7 * one_plus_cv_squared(load), dtype=torch.float64)
    capacity = len(x_TD) if factor is None else capacity_of(factor, len(who), K, E)
    return serve(ids, who, capacity), weights, losses


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("factor", [None, 0.6])
@pytest.mark.parametrize(("num_experts", "top_k"), [(5, 1), (5, 2), (5, 4), (3, 3), (1, 1)])
def test_is_the_paper(monkeypatch, num_experts, top_k, factor, mask, training):
    noise_TE = torch.randn(9, num_experts, dtype=torch.float64)
    monkeypatch.setattr(noise, "normal", lambda like: noise_TE)
    options = {"importance_loss_weight": 0.3, "load_loss_weight": 0.7, "capacity_factor": factor}
    router = drawn(NoisyTopKRouter(4, num_experts, top_k, **options)).train(training)
    x_TD = tokens()
    assert_same(router, x_TD, MASKS[mask], *by_hand(router, x_TD, MASKS[mask], noise_TE, factor))


def test_starts_at_zero_and_returns_there():
    router = drawn(NoisyTopKRouter(4, 3))
    router.reset_parameters()
    for fresh in (router, NoisyTopKRouter(4, 3)):
        assert all(not p.any() for p in fresh.parameters())
    assert NoisyTopKRouter.own_init


def test_no_token():
    assert_silent_on_no_token(drawn(NoisyTopKRouter(4, 3)))


def test_even_load_is_the_weight(monkeypatch):
    """Token t prefers expert t by the same margin: every expert has the same importance and the same load."""
    monkeypatch.setattr(noise, "normal", lambda like: 2 * torch.eye(4))
    losses = NoisyTopKRouter(4, 4, 1, importance_loss_weight=0.25, load_loss_weight=0.5)(torch.randn(4, 4)).losses
    assert losses["importance"].item() == pytest.approx(0.25, rel=1e-6)
    assert losses["load"].item() == pytest.approx(0.5, rel=1e-6)


def test_noise_has_the_learned_deviation():
    router = NoisyTopKRouter(4, 3, 3)
    torch.nn.init.normal_(router.noise.weight)
    x_TD = torch.randn(1, 4).expand(20_000, 4)
    log_TE = router(x_TD).scores_TE.detach().log()  # noise up to a constant per token: differences of two experts
    std_E = torch.nn.functional.softplus(router.noise.weight @ x_TD[0])
    for a, b in ((0, 1), (1, 2)):
        difference_T = log_TE[:, a] - log_TE[:, b]
        expected = (std_E[a] ** 2 + std_E[b] ** 2).sqrt().item()
        assert difference_T.std().item() == pytest.approx(expected, rel=5 / math.sqrt(2 * 20_000))
        assert abs(difference_T.mean().item()) < 5 * expected / math.sqrt(20_000)


def test_chance_is_how_often_an_expert_is_chosen():
    """Appendix A: draw one expert's noise anew many times and count how often it is among the K best."""
    clean_TE, std_TE = torch.randn(1, 5), torch.rand(1, 5) + 0.5
    noisy_TE = clean_TE + torch.randn(1, 5) * std_TE
    chance_TE = chance_of_choice(clean_TE, noisy_TE, std_TE, 2)
    for e in range(5):
        draws_NE = noisy_TE.repeat(10_000, 1)
        draws_NE[:, e] = clean_TE[0, e] + torch.randn(10_000) * std_TE[0, e]
        rate = (draws_NE.topk(2, dim=1).indices == e).any(1).float().mean().item()
        chance = chance_TE[0, e].item()
        assert abs(rate - chance) < 5 * math.sqrt(chance * (1 - chance) / 10_000) + 1e-6


def test_vanishing_noise_stays_finite():
    router = NoisyTopKRouter(1, 3, 1)
    torch.nn.init.constant_(router.noise.weight, -500)
    routing = router(torch.ones(4, 1))
    sum(routing.losses.values()).backward()
    assert all(torch.isfinite(p.grad).all() for p in router.parameters())


def test_zero_weights_leave_losses_out():
    assert not NoisyTopKRouter(4, 3, importance_loss_weight=0, load_loss_weight=0)(torch.randn(5, 4)).losses


@pytest.mark.parametrize("top_k", [1, 2])
def test_learns(top_k):
    assert_learns("noisy_topk", top_k)


@pytest.mark.parametrize("name", ["importance_loss_weight", "load_loss_weight"])
@pytest.mark.parametrize("value", [-1, math.inf, math.nan, "0.1"])
def test_bad_options(name, value):
    assert_refused("noisy_topk", 2, {name: value}, f"{name} must be a finite number >= 0")


def test_a_layer_that_is_reset_starts_at_zero_too():
    layer = fastmoe.MoE(4, 3, 2, router="noisy_topk")
    torch.nn.init.normal_(layer.router.noise.weight)
    layer.reset_parameters()
    assert layer.router.proj.weight.abs().max() == layer.router.noise.weight.abs().max() == 0
