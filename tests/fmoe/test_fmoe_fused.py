"""`FMoETransformerMLP` in one call of the fused kernel: the same numbers, and nothing of a user's is passed by."""

import copy

import plain_loops
import pytest
import torch
import torch.nn.functional as F
from helpers import assert_same
from torch import nn

import fmoe
from fastmoe import kernels

E, D, H, T = 3, 6, 9, 11


@pytest.fixture
def calls(monkeypatch):
    """The activations of the kernel's calls."""
    seen, kernel = [], kernels.expert_mlp

    def counted(*args, activation, **options):
        seen.append(activation)
        return kernel(*args, activation=activation, **options)

    monkeypatch.setattr(kernels, "expert_mlp", counted)
    return seen


def build(activation=None):
    torch.manual_seed(3)
    layer = fmoe.FMoETransformerMLP(E, D, H, activation).double()
    for expert in layer.experts:
        nn.init.normal_(expert.htoh4.bias)
        nn.init.normal_(expert.h4toh.bias)
    return layer


def check(layer, num_tokens=T):
    """Against each expert's `activation`, by hand."""

    def loop(x):
        logits = x @ layer.gate.gate.weight.T + layer.gate.gate.bias
        return plain_loops.mixture(x, *plain_loops.softmax_topk(logits, 2), plain_loops.mlps(layer))

    x = torch.randn(num_tokens, D, dtype=torch.float64)
    assert_same(plain_loops.outcome(layer, layer, x), plain_loops.outcome(loop, layer, x))


@pytest.mark.parametrize(
    ("activation", "name"),
    [
        (None, "gelu"),
        (nn.GELU("tanh"), "gelu_tanh"),
        (F.gelu, "gelu"),
        (nn.ReLU(), "relu"),
        (F.relu, "relu"),
        (torch.relu, "relu"),
        (nn.SiLU(), "silu"),
        (F.silu, "silu"),
    ],
)
def test_activations_that_the_kernel_knows(activation, name, calls):
    check(build(activation))
    assert calls == [name]


class Shifted(nn.GELU):
    def forward(self, x):
        return super().forward(x + 1)


@pytest.mark.parametrize("activation", [torch.tanh, Shifted(), nn.Sequential(nn.GELU()), lambda x: F.gelu(x) + 1])
def test_activations_that_it_does_not_know(activation, calls):
    check(build(activation))
    assert not calls


def test_evaluation(calls):
    layer, x = build(), torch.randn(T, D, dtype=torch.float64)
    expected = layer(x)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), expected)
    assert calls == ["gelu"]


def test_few_rows(calls):
    check(build(), num_tokens=5)
    assert not calls
    check(build(), num_tokens=6)
    assert calls == ["gelu"]


def test_experts_that_differ(calls):
    layer = build()
    layer.experts[1].activation = nn.ReLU()
    check(layer)
    narrow = build()
    narrow.experts[1].htoh4, narrow.experts[1].h4toh = (
        fmoe.FMoELinear(1, D, 4).double(),
        fmoe.FMoELinear(1, 4, D).double(),
    )
    check(narrow)
    without = build()
    for expert in without.experts:
        expert.htoh4.bias = None
    without(torch.randn(T, D, dtype=torch.float64)).sum().backward()
    assert not calls


class Scaled(fmoe.FMoELinear):
    def forward(self, inp, fwd_expert_count):
        return 2 * super().forward(inp, fwd_expert_count)


def replace_linear(expert):
    linear = expert.htoh4
    expert.htoh4 = Scaled(1, D, H).double()
    expert.htoh4.load_state_dict(linear.state_dict())


def own_forward(expert):
    plain = expert.htoh4.forward
    expert.htoh4.forward = lambda *given: 2 * plain(*given)


HOOKS = {
    "after": lambda expert: expert.htoh4.register_forward_hook(lambda _, given, out: 2 * out),
    "replaced": replace_linear,
    "own forward": own_forward,
}


@pytest.mark.parametrize("kind", HOOKS)
def test_what_a_user_put_around_an_expert(kind, calls):
    layer, doubled = build(), build()
    with torch.no_grad():
        for parameter in doubled.experts[1].htoh4.parameters():
            parameter.mul_(2)
    x = torch.randn(T, D, dtype=torch.float64)
    expected = doubled(x)
    calls.clear()
    HOOKS[kind](layer.experts[1])
    torch.testing.assert_close(layer(x), expected)
    assert not calls


@pytest.mark.parametrize("kind", ["forward_pre_hook", "full_backward_hook", "full_backward_pre_hook"])
def test_hooks_that_only_look(kind, calls):
    layer, seen = build(), []
    getattr(layer.experts[2].h4toh, f"register_{kind}")(lambda *_: seen.append(kind))
    layer(torch.randn(T, D, dtype=torch.float64)).sum().backward()
    assert seen == [kind]
    assert not calls


def test_a_replaced_expert(calls):
    layer = build()
    layer.experts[1] = plain_loops.RowExpert(D).double()
    layer(torch.randn(T, D, dtype=torch.float64)).sum().backward()
    assert layer.experts[1].linear.weight.grad.any()
    assert not calls


def test_frozen_experts_and_copies(calls):
    layer = build()
    layer.experts[1].requires_grad_(False)
    check(layer)
    assert layer.experts[1].htoh4.weight.grad is None
    check(copy.deepcopy(layer))
    assert len(calls) == 2
