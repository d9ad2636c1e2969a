"""Softmax, then the K best; its balance losses against the papers' formulas, token by token."""

import math

import pytest
import torch

import fastmoe
from fastmoe.routers import RoutingContext, TopKRouter, load_balance_loss, z_loss


def by_hand(logits_TE, top_k, counted):
    """Switch Transformer equations 4 to 6 and ST-MoE equation 5, over the tokens in `counted`."""
    num_experts = logits_TE.shape[1]
    chosen, probs, squares = [0.0] * num_experts, [0.0] * num_experts, 0.0
    for t in counted:
        exps = [math.exp(v) for v in logits_TE[t].tolist()]
        total = sum(exps)
        for e in sorted(range(num_experts), key=lambda e: -exps[e])[:top_k]:
            chosen[e] += 1 / (len(counted) * top_k)
        for e in range(num_experts):
            probs[e] += exps[e] / total / len(counted)
        squares += math.log(total) ** 2 / len(counted)
    return num_experts * sum(f * p for f, p in zip(chosen, probs, strict=True)), squares


@pytest.mark.parametrize("top_k", [1, 2, 4])
@pytest.mark.parametrize("masked", [False, True])
def test_losses_are_the_papers(top_k, masked):
    router = TopKRouter(6, 4, top_k, aux_loss_weight=0.5, z_loss_weight=0.25).double()
    x = torch.randn(9, 6, dtype=torch.float64)
    mask = torch.tensor([True, False] * 4 + [True]) if masked else None
    routing = router(x, RoutingContext(mask))
    counted = [t for t in range(9) if mask is None or mask[t]]
    balance, z = by_hand(x @ router.proj.weight.T, top_k, counted)
    assert routing.losses["load_balance"].item() == pytest.approx(0.5 * balance, rel=1e-12)
    assert routing.losses["z"].item() == pytest.approx(0.25 * z, rel=1e-12)


def test_bounds_of_the_balance_loss():
    ids_TK = torch.arange(8).view(4, 2)
    assert load_balance_loss(torch.full((4, 8), 1 / 8), ids_TK).item() == pytest.approx(1)
    one_hot = torch.zeros(4, 8).index_fill(1, torch.tensor([3]), 1.0)
    assert load_balance_loss(one_hot, torch.full((4, 1), 3)).item() == pytest.approx(8)


@pytest.mark.parametrize("mask", [None, torch.zeros(0, dtype=torch.bool)])
def test_losses_of_no_token(mask):
    probs = torch.zeros(0, 3, requires_grad=True)
    for loss in (load_balance_loss(probs, torch.zeros(0, 2, dtype=torch.int64), mask), z_loss(probs, mask)):
        assert loss.item() == 0
    nobody = torch.zeros(5, dtype=torch.bool)
    assert load_balance_loss(torch.rand(5, 3), torch.zeros(5, 2, dtype=torch.int64), nobody).item() == 0
    assert z_loss(torch.rand(5, 3), nobody).item() == 0


def test_zero_weights_leave_losses_out():
    assert not TopKRouter(4, 3, aux_loss_weight=0)(torch.randn(5, 4)).losses


@pytest.mark.parametrize("top_k", [1, 3])
def test_weights(top_k):
    x = torch.randn(7, 4, dtype=torch.float64)
    weights = {}
    for normalize in (None, True, False, "stop_gradient"):
        torch.manual_seed(3)
        router = TopKRouter(4, 5, top_k, normalize=normalize).double()
        routing = router(x)
        weights[normalize] = routing.weights_N.view(7, top_k)
        (grad,) = torch.autograd.grad((weights[normalize] * torch.randn(7, top_k)).sum(), router.proj.weight)
        learns = grad.abs().max() > 1e-6
        assert learns == (not (normalize is True and top_k == 1))
    best = torch.softmax(x @ router.proj.weight.T, 1).sort(1, descending=True)
    torch.testing.assert_close(weights[False], best.values[:, :top_k])
    assert torch.equal(routing.expert_ids_N.view(7, top_k), best.indices[:, :top_k])
    for normalize in (True, "stop_gradient"):
        torch.testing.assert_close(weights[normalize], weights[False] / weights[False].sum(1, keepdim=True))
    torch.testing.assert_close(weights[None], weights[top_k > 1])


def test_stop_gradient_is_the_gradient_of_p_over_a_constant():
    x, upstream = torch.randn(7, 4, dtype=torch.float64), torch.randn(7, 2, dtype=torch.float64)
    router = TopKRouter(4, 5, 2, normalize="stop_gradient").double()
    probs = torch.softmax(router.proj(x), 1).topk(2).values
    expected = torch.autograd.grad((probs / probs.sum(1, keepdim=True).detach() * upstream).sum(), router.proj.weight)
    got = torch.autograd.grad((router(x).weights_N.view(7, 2) * upstream).sum(), router.proj.weight)
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("autocast", [False, True])
def test_arithmetic_is_float32_at_least(dtype, autocast):
    router = TopKRouter(64, 8, 2).to(dtype)
    x = torch.randn(50, 64).to(dtype)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        routing = router(x)
    assert {routing.weights_N.dtype, routing.scores_TE.dtype, routing.losses["load_balance"].dtype} == {torch.float32}
    scores = torch.softmax(x.float() @ router.proj.weight.float().T, 1)
    torch.testing.assert_close(routing.scores_TE, scores)
    routing.weights_N.sum().backward()
    assert router.proj.weight.grad.dtype == dtype


def test_arithmetic_is_float64_for_a_float64_model():
    routing = TopKRouter(4, 3, 2).double()(torch.randn(5, 4, dtype=torch.float64))
    assert {routing.weights_N.dtype, routing.losses["load_balance"].dtype} == {torch.float64}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"normalize": "yes"}, "unknown normalize 'yes'"),
        ({"aux_loss_weight": -1}, "aux_loss_weight must be a finite number >= 0, got -1"),
        ({"z_loss_weight": math.nan}, "z_loss_weight must be a finite number >= 0, got nan"),
        ({"aux_loss_weight": "0.1"}, "aux_loss_weight must be a finite number"),
        ({"aux_los_weight": 1}, "unknown option of router 'topk' 'aux_los_weight'. Did you mean 'aux_loss_weight'"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        fastmoe.MoE(4, 3, router_options=options)


def test_top_k_above_the_number_of_experts():
    with pytest.raises(ValueError, match="top_k must be at most num_experts, got top_k=4 of 3 experts"):
        TopKRouter(4, 3, 4)


def slow_choice(scores, num_groups, top_groups, top_k):
    """The K best experts among those of the best groups, by the sum of each group's two best scores."""
    size = len(scores) // num_groups
    value = [sum(sorted(scores[g * size : (g + 1) * size])[-2:]) for g in range(num_groups)]
    groups = sorted(range(num_groups), key=lambda g: -value[g])[:top_groups]
    return sorted((e for e in range(len(scores)) if e // size in groups), key=lambda e: -scores[e])[:top_k]


@pytest.mark.parametrize("score_function", ["softmax", "sigmoid"])
@pytest.mark.parametrize("score_after", [False, True])
@pytest.mark.parametrize("groups", [(1, 1), (4, 2), (2, 1), (8, 3)])
@pytest.mark.parametrize("normalize", [False, True])
def test_scores_groups_and_scale(score_function, score_after, groups, normalize):
    options = {"score_function": score_function, "score_after": score_after, "normalize": normalize, "scale": 2.5}
    router = TopKRouter(6, 8, 3, num_groups=groups[0], top_groups=groups[1], **options).double()
    x_TD = torch.randn(9, 6, dtype=torch.float64)
    routing = router(x_TD)
    for t, logits in enumerate((x_TD @ router.proj.weight.T).tolist()):
        exps = [math.exp(v) for v in logits]
        softmax = [v / sum(exps) for v in exps]
        scores = softmax if score_function == "softmax" else [1 / (1 + math.exp(-v)) for v in logits]
        ids = slow_choice(scores, *groups, 3)
        weights = [scores[e] for e in ids]
        if score_after and score_function == "softmax":
            weights = [exps[e] / sum(exps[i] for i in ids) for e in ids]
        total = sum(weights) if normalize else 1
        assert routing.expert_ids_N.view(9, 3)[t].tolist() == ids
        assert routing.weights_N.view(9, 3)[t].tolist() == pytest.approx([2.5 * w / total for w in weights])


@pytest.mark.parametrize("normalize", [True, "stop_gradient"])
def test_sigmoid_scores_that_are_all_0(normalize):
    router = TopKRouter(1, 4, 2, score_function="sigmoid", normalize=normalize)
    router.proj.weight.data.fill_(-200.0)
    x_TD = torch.ones(3, 1, requires_grad=True)
    routing = router(x_TD)
    assert routing.weights_N.tolist() == [0.5] * 6
    assert routing.losses["load_balance"].isfinite()
    (routing.weights_N.square().sum() + routing.losses["load_balance"]).backward()
    assert x_TD.grad.isfinite().all()
