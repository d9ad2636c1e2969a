"""Calls that are legal and rare, and calls that are wrong."""

import pytest
import torch
from helpers import CASES, assert_measured

pytest.importorskip("triton")

from triton_cases import DEVICE, mlp_inputs, routed, three_ways, use_tile

import fastmoe
from fastmoe import kernels
from fastmoe.kernels import registry
from fastmoe.kernels.triton.tiles import Tile

pytestmark = pytest.mark.usefixtures("poison")


def test_a_plan_that_is_a_view():
    case = CASES["odd"]
    token_ids_N, _, per_token, plan = routed(case)
    x, w1 = torch.randn(case.T, case.D, device=DEVICE), torch.randn(case.E, case.H, case.D, device=DEVICE)
    w2, weights_N = torch.randn(case.E, case.D, case.H, device=DEVICE), torch.rand(len(token_ids_N), device=DEVICE)
    view = kernels.Plan(*(t.repeat_interleave(2)[::2] for t in (plan.order_N, plan.offsets_E)))
    assert not view.order_N.is_contiguous()
    given = {"activation": "gelu", "rows_per_token": per_token, "backend": "triton"}
    got, expected = (
        kernels.expert_mlp(x, token_ids_N, weights_N, p, w1, None, w2, None, **given) for p in (view, plan)
    )
    assert torch.equal(got, expected)


@pytest.mark.parametrize("turned", [False, True])
def test_a_dimension_of_one_with_an_odd_stride(turned, monkeypatch):
    """A contiguous tensor may have any stride there, and a tensor descriptor may not."""
    use_tile(monkeypatch, Tile(16, 16, 16, group=1, tma=True))
    wide = torch.randn(1, 13)
    tensors = {"rows": wide[0], "weight": torch.randn(1, 7, 8) if turned else torch.randn(1, 8, 8)}
    offsets = torch.ones(1, dtype=torch.int32, device=DEVICE)

    def through(backend):
        return lambda rows, weight: kernels.grouped_mm(
            rows.as_strided((1, 8), (13, 1)), weight, offsets, backend=backend
        )

    assert_measured(*three_ways(through, tensors, torch.randn(1, tensors["weight"].shape[1])))


def test_rows_per_token_that_does_not_fit():
    through, tensors, _ = mlp_inputs(CASES["odd"], "gelu", False, torch.float32)
    tensors = {name: None if t is None else t.to(DEVICE) for name, t in tensors.items()}
    tensors["x"] = tensors["x"][:-1]
    with pytest.raises(ValueError, match="rows_per_token=2 means 12 tokens of 2 rows each, got 26 rows"):
        through("triton")(**tensors)


@pytest.mark.skipif(DEVICE.type == "cuda", reason="it stops the device, and with it every test that follows")
@pytest.mark.parametrize("wrong", [-1, 5])
def test_a_token_id_out_of_range(wrong):
    plan = kernels.plan(torch.tensor([1, 0, 1]), 2)
    with pytest.raises(ValueError, match=r"token ids must lie in 0\.\.4"):
        kernels.combine(torch.randn(3, 4), torch.tensor([0, wrong, 1]), torch.ones(3), plan, 5, backend="triton")


@pytest.mark.parametrize("flaw", [{"top_k": True}, {"top_k": 1.5}, {"normalize": "stop_gradient"}], ids=str)
def test_scores_of_something_else(flaw):
    with pytest.raises(ValueError, match=f"{next(iter(flaw))} must be"):
        kernels.score_topk(torch.randn(3, 4, device=DEVICE), **({"top_k": 2} | flaw))


def test_a_matrix_too_large_for_int32_is_refused():
    weight = torch.empty(1, 1 << 16, 1 << 15, device="meta")
    reason = registry.BACKENDS["triton"].refuses("grouped_mm", torch.empty(1, 1 << 15, device=DEVICE), weight)
    assert reason == f"it takes up to {2**31 - 1} numbers in an expert's matrix, got {2**31}"


def test_the_layers_backend_is_its_routers_too(monkeypatch):
    """Where Triton goes first, `backend="reference"` must still differentiate twice."""
    monkeypatch.setitem(registry.PREFERENCE, DEVICE.type, ["triton", "torch"])
    layer = fastmoe.MoE(6, 3, 2, d_hidden=5, backend="reference").to(DEVICE)
    x = torch.randn(4, 6, device=DEVICE, requires_grad=True)
    (slope,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
    slope.square().sum().backward()
    assert layer.router.proj.weight.grad.abs().sum() > 0
