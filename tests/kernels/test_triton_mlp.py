"""The routed MLP by Triton, against the reference: values and every gradient."""

from dataclasses import replace

import pytest
import torch
from helpers import CASES, Case, assert_measured

pytest.importorskip("triton")

from triton_cases import (
    DEVICE,
    DTYPES,
    KINDS,
    LARGE,
    mlp_three_ways,
    use_tile,
)

from fastmoe import kernels

pytestmark = pytest.mark.usefixtures("poison")


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize(("activation", "bias"), KINDS)
@pytest.mark.parametrize("per_token", [True, False])
def test_every_case(name, activation, bias, per_token):
    assert_measured(*mlp_three_ways(CASES[name], activation, bias, torch.float32, per_token))


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_every_case_in_half_precision(name, dtype):
    which = list(CASES).index(name) % 2  # each kind in half of the cases; the slow tests have all
    assert_measured(*mlp_three_ways(CASES[name], *KINDS[which], dtype, per_token=bool(which)))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", sorted(CASES.keys() - {"width_one"}))
@pytest.mark.parametrize("activation", kernels.ACTIVATIONS)
def test_everything_with_everything(activation, name, dtype):
    """With three times the tokens, and not of width one: the largest of a few errors is a matter of luck."""
    case = replace(CASES[name], T=3 * CASES[name].T)
    for bias in (True, False):
        for per_token in (True, False):
            assert_measured(*mlp_three_ways(case, activation, bias, dtype, per_token))


def test_more_experts_than_are_looked_up_at_once():
    assert_measured(*mlp_three_ways(Case(2, 160, 5, 3, 10), "gelu", True, torch.float32))


@pytest.mark.parametrize("activation", kernels.ACTIVATIONS)
def test_every_activation(activation):
    for dtype in DTYPES:
        assert_measured(*mlp_three_ways(Case(6, 2, 5, 9, 2, "dropped"), activation, True, dtype))


@pytest.mark.parametrize("activation", ["relu", "gelu", "gelu_tanh", "silu"])
def test_activations_far_from_zero(activation, monkeypatch):
    """One expert, w1 and w2 the identity: the activation itself, and its slope, over all magnitudes."""
    use_tile(monkeypatch, LARGE)
    z = torch.cat([torch.linspace(-12, 12, 1001), torch.tensor([-1e4, -100.0, -0.0, 0.0, 100.0, 1e4])])
    x = torch.cat([z, torch.randn(1) * 1e-4]).view(-1, 16).to(DEVICE).requires_grad_()
    eye = torch.eye(16, device=DEVICE)[None]
    plan = kernels.plan(torch.zeros(len(x), dtype=torch.int64, device=DEVICE), 1, backend="triton")
    rows = (torch.arange(len(x), device=DEVICE), torch.ones(len(x), device=DEVICE), plan)
    y = kernels.expert_mlp(x, *rows, eye, None, eye, None, activation=activation, backend="triton")
    (slope,) = torch.autograd.grad(y.sum(), x)
    exact = x.detach().double().requires_grad_()
    expected = kernels.activate(activation, exact)
    (exact_slope,) = torch.autograd.grad(expected.sum(), exact)
    rtol = 3e-7 if DEVICE.type == "cpu" else 1e-6  # a GPU's own exponential
    torch.testing.assert_close(y.double(), expected, rtol=rtol, atol=1e-6)
    torch.testing.assert_close(slope.double(), exact_slope, rtol=rtol, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "case", [Case(63, 5, 65, 100, 1), Case(65, 3, 129, 63, 1), Case(50, 4, 63, 129, 2, "dropped")], ids=str
)
def test_odd_sizes(case, dtype, monkeypatch):
    use_tile(monkeypatch, LARGE)
    assert_measured(*mlp_three_ways(case, *KINDS[dtype == torch.float32], dtype))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("T", [63, 65, 129])
@pytest.mark.parametrize("D", [63, 65, 100, 129])
@pytest.mark.parametrize("H", [63, 65, 100, 129])
def test_all_odd_sizes(T, D, H, dtype, monkeypatch):
    use_tile(monkeypatch, LARGE)
    for activation, bias in KINDS:
        assert_measured(*mlp_three_ways(Case(T, 4, D, H, 2, "dropped"), activation, bias, dtype))
