"""Switch routing against Fedus et al. 2021, section 2.2, token by token."""

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

from fastmoe.routers import SwitchRouter, noise


def by_hand(router, x_TD, mask_T, noise_TD, factor):
    who, E = counted(len(x_TD), mask_T), router.num_experts
    seen = x_TD
    if router.training:
        low, high = 1 - router.jitter, 1 + router.jitter
        seen = [[x_TD[t, d] * (low + (high - low) * noise_TD[t, d]) for d in range(4)] for t in range(len(x_TD))]
    logits = linear(router.proj.weight, seen)
    probs = [softmax(row) for row in logits]
    ids = [best(row, 1) for row in probs]
    weights = [[row[e]] for row, (e,) in zip(probs, ids, strict=True)]
    squares = sum(sum(v.exp() for v in logits[t]).log() ** 2 for t in who)
    losses = {"load_balance": 0.5 * balance(probs, [e for (e,) in ids], who), "z": 0.25 * squares / len(who)}
    return serve(ids, who, capacity_of(factor, len(who), 1, E)), weights, losses


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("factor", [0.5, 1.25, 5.0])
@pytest.mark.parametrize("num_experts", [5, 1])
def test_is_the_paper(monkeypatch, num_experts, factor, mask, training):
    noise_TD = torch.rand(9, 4, dtype=torch.float64)
    monkeypatch.setattr(noise, "uniform", lambda like: noise_TD)
    options = {"jitter": 0.4, "aux_loss_weight": 0.5, "z_loss_weight": 0.25}
    router = SwitchRouter(4, num_experts, **options, capacity_factor=factor, eval_capacity_factor=None)
    torch.nn.init.normal_(router.proj.weight)
    router, x_TD = router.double().train(training), tokens()
    assert_same(router, x_TD, MASKS[mask], *by_hand(router, x_TD, MASKS[mask], noise_TD, factor))


def test_defaults_are_the_papers():
    router = SwitchRouter(4, 3)
    assert (router.capacity_factor, router.eval_capacity_factor, router.top_k) == (1.25, 2.0, 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_jitter_is_uniform_within_its_bounds(dtype):
    """With W = (1, 0) the logits are what the router saw of x = 1, and 0."""
    router = SwitchRouter(1, 2, jitter=0.1)
    router.proj.weight.data = torch.tensor([[1.0], [0.0]])
    seen_T = torch.logit(router.to(dtype)(torch.ones(20_000, 1, dtype=dtype)).scores_TE[:, 0].detach())
    assert 0.9 - 1e-5 < seen_T.min() < 0.901
    assert 1.099 < seen_T.max() < 1.1 + 1e-5
    assert seen_T.mean().item() == pytest.approx(1, abs=5 * 0.2 / 12**0.5 / 20_000**0.5)
    assert seen_T.std().item() == pytest.approx(0.2 / 12**0.5, rel=0.03)
    assert len(seen_T.unique()) > 5_000


def test_no_jitter_draws_nothing(monkeypatch):
    monkeypatch.setattr(noise, "uniform", None)
    SwitchRouter(4, 3, jitter=0)(torch.randn(5, 4))
    SwitchRouter(4, 3).eval()(torch.randn(5, 4))


def test_no_token():
    assert_silent_on_no_token(SwitchRouter(4, 3, z_loss_weight=0.1).double())


def test_even_load_is_the_weight():
    router = SwitchRouter(4, 4, aux_loss_weight=0.25, jitter=0)
    router.proj.weight.data = torch.eye(4)
    assert router(torch.eye(4)).losses["load_balance"].item() == pytest.approx(0.25, rel=1e-6)


def test_learns():
    assert_learns("switch", 1)


@pytest.mark.parametrize(
    ("top_k", "options", "message"),
    [
        (2, {}, r"give top_k=1 \(the default of fastmoe.MoE is 2\), got top_k=2"),
        (1, {"jitter": -0.1}, "jitter must be a finite number >= 0"),
        (1, {"jitter": 1}, "jitter must be below 1, got 1"),
        (1, {"aux_loss_weight": -1}, "aux_loss_weight must be a finite number >= 0"),
        (1, {"z_loss_weight": "a"}, "z_loss_weight must be a finite number >= 0"),
    ],
)
def test_bad_options(top_k, options, message):
    assert_refused("switch", top_k, options, message)
