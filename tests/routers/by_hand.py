"""Routing written down token by token from the papers, and the comparison of a router with it."""

import math
from collections import Counter
from fractions import Fraction

import pytest
import torch

import fastmoe
from fastmoe.routers import RoutingContext

MASKS = {"all": None, "padded": torch.tensor([True, False, True, True, False, True, True, True, False])}


def tokens(num_tokens=9, d_model=4):
    return torch.randn(num_tokens, d_model, dtype=torch.float64, requires_grad=True)


def counted(num_tokens, mask_T):
    return [t for t in range(num_tokens) if mask_T is None or mask_T[t]]


def linear(weight_ED, x_TD):
    return [[sum(w * v for w, v in zip(row, x, strict=True)) for row in weight_ED] for x in x_TD]


def softmax(logits):
    exps = [v.exp() for v in logits]
    return [v / sum(exps) for v in exps]


def best(values, k):
    return sorted(range(len(values)), key=lambda e: -values[e].item())[:k]


def capacity_of(factor, num_counted, top_k, num_experts):
    return math.ceil(Fraction(str(factor)) * num_counted * top_k / num_experts)


def serve(ids, tokens_counted, capacity):
    """Ids with -1 for padding and for those who find their expert full: first choices first, earlier tokens first."""
    taken = Counter()
    served = [[-1] * len(row) for row in ids]
    for k in range(len(ids[0])):
        for t in tokens_counted:
            if taken[ids[t][k]] < capacity:
                served[t][k] = ids[t][k]
            taken[ids[t][k]] += 1
    return served


def balance(probs, first_choices, tokens_counted):
    """GShard's and Switch's loss: E * sum over experts of its share of first choices * its mean probability."""
    n, num_experts = len(tokens_counted), len(probs[0])
    shares = Counter(first_choices[t] for t in tokens_counted)
    means = [sum(probs[t][e] for t in tokens_counted) / n for e in range(num_experts)]
    return num_experts * sum(shares[e] / n * means[e] for e in range(num_experts))


def one_plus_cv_squared(loads):
    mean = sum(loads) / len(loads)
    return 1 + sum((load - mean) ** 2 for load in loads) / len(loads) / mean**2


def assert_same(router, x_TD, mask_T, ids, weights, losses, **context):
    """Ids, weights, losses, and the gradient of them all together by x and by every parameter."""
    routing = router(x_TD, RoutingContext(mask_T, **context))
    assert routing.expert_ids_N.tolist() == [e for row in ids for e in row]
    assert routing.losses.keys() == losses.keys()
    total, expected = x_TD.sum() * 0, x_TD.sum() * 0
    flat = [w for row in weights for w in row]
    for e, got, want in zip(routing.expert_ids_N.tolist(), routing.weights_N, flat, strict=True):
        if e >= 0:
            torch.testing.assert_close(got, want)
            upstream = torch.randn(()).item()
            total, expected = total + upstream * got, expected + upstream * want
    for name, loss in losses.items():
        torch.testing.assert_close(routing.losses[name], loss)
        upstream = torch.randn(()).item()
        total, expected = total + upstream * routing.losses[name], expected + upstream * loss
    leaves = [x_TD, *router.parameters()]
    got = torch.autograd.grad(total, leaves, allow_unused=True, materialize_grads=True)
    want = torch.autograd.grad(expected, leaves, allow_unused=True, materialize_grads=True)
    torch.testing.assert_close(got, want)
    return routing


def assert_silent_on_no_token(router):
    """No token, and padding alone: losses are 0 and every gradient is 0, not NaN."""
    for x_TD, mask_T in ((tokens(0), None), (tokens(3), torch.zeros(3, dtype=torch.bool))):
        routing = router(x_TD, RoutingContext(mask_T))
        assert routing.expert_ids_N.tolist() == [-1] * (len(x_TD) * router.top_k)
        assert [loss.item() for loss in routing.losses.values()] == [0] * len(routing.losses)
        total = sum(routing.losses.values()) + 0 * routing.weights_N.sum()
        grads = torch.autograd.grad(total, [x_TD, *router.parameters()], allow_unused=True, materialize_grads=True)
        assert all(bool((grad == 0).all()) for grad in grads)


def assert_learns(name, top_k, **options):
    """One step on a toy problem moves the router and lowers the error."""
    layer = fastmoe.MoE(8, 4, top_k, d_hidden=16, router=name, router_options=options)
    x, target = torch.randn(64, 8), torch.randn(64, 8)
    before = [p.detach().clone() for p in layer.router.parameters()]

    def error():
        torch.manual_seed(5)
        with fastmoe.collect_aux_losses(layer):  # and left out: the router learns by what its weights do
            return (layer(x) - target).square().mean()

    first = error()
    first.backward()
    torch.optim.SGD(layer.parameters(), lr=0.02).step()
    assert error() < first
    for old, new in zip(before, layer.router.parameters(), strict=True):
        assert (new - old).abs().max() > 1e-6


def assert_refused(name, top_k, options, message):
    with pytest.raises(ValueError, match=message):
        fastmoe.MoE(4, 5, top_k, router=name, router_options=options)
