"""The routed MLP by Triton: what is frozen, strided, dropped or NaN; and what autograd and autocast make of it."""

import pytest
import torch
from helpers import CASES, Case, run_with_grads

pytest.importorskip("triton")

from triton_cases import DEVICE, assert_equal, assert_strides_do_not_matter, mlp_inputs, moved, use_tile

from fastmoe import kernels

pytestmark = pytest.mark.usefixtures("poison")


@pytest.mark.parametrize(
    "frozen",
    [
        ["x"],
        ["weights"],
        ["w1", "b1", "w2", "b2"],
        ["x", "w1", "b1"],
        ["w1"],
        ["w2"],
        ["x", "weights", "w1", "b1", "w2"],
        ["x", "weights", "b1", "w2", "b2"],
        ["x", "w1", "b1", "w2", "b2"],
    ],
    ids="-".join,
)
def test_frozen_arguments(frozen):
    through, tensors, upstream = mlp_inputs(CASES["dropped"], "swiglu", True, torch.float32)
    tensors, upstream = moved(tensors), upstream.to(DEVICE)
    function = through("triton")
    expected = run_with_grads(function, tensors, upstream)
    constant = {name: tensors[name] for name in frozen}
    learned = {name: t for name, t in tensors.items() if name not in frozen}
    got = run_with_grads(lambda **leaves: function(**leaves, **constant), learned, upstream)
    assert_equal(got, {name: t for name, t in expected.items() if name not in frozen})


@pytest.mark.parametrize("per_token", [True, False])
def test_strides_do_not_matter(per_token):
    through, tensors, upstream = mlp_inputs(Case(6, 3, 8, 9, 2), "geglu", True, torch.float32, per_token)
    assert_strides_do_not_matter(through("triton"), tensors, upstream)


@pytest.mark.parametrize("tile", ["own", None], ids=["triton", "pytorch"])
def test_nan_in_a_dropped_row_stays_there(tile, monkeypatch):
    """Token 0 is dropped everywhere: its values, its routing weights and its gradient are never read."""
    if tile is None:
        use_tile(monkeypatch, None)
    case = Case(11, 4, 8, 16, 3, "dropped")
    token_ids_N = torch.arange(case.T).repeat_interleave(case.K).to(DEVICE)
    expert_ids_N = torch.rand(case.T, case.E).argsort(1)[:, : case.K].flatten().to(DEVICE)
    expert_ids_N[torch.rand(case.T * case.K) < 0.4] = -1
    expert_ids_N[: case.K] = -1
    _, tensors, upstream = mlp_inputs(case, "swiglu", False, torch.float32)
    tensors, upstream = moved(tensors), upstream.to(DEVICE)

    def results(per_token):
        def function(x, weights, w1, b1, w2, b2):
            plan = kernels.plan(expert_ids_N, case.E, backend="triton")
            options = {"activation": "swiglu", "rows_per_token": per_token, "backend": "triton"}
            return kernels.expert_mlp(x, token_ids_N, weights, plan, w1, b1, w2, b2, **options)

        return run_with_grads(function, tensors, upstream)

    clean = results(case.K)
    assert not clean["out"][0].any()
    assert not clean["weights"][expert_ids_N == -1].any()
    tensors["x"][0] = upstream[0] = torch.nan
    tensors["weights"][expert_ids_N == -1] = torch.nan
    for per_token in (case.K, 0):
        assert_equal(results(per_token), clean)


def test_nan_in_a_row_reaches_its_token_alone():
    through, tensors, _ = mlp_inputs(Case(30, 3, 16, 20, 2), "gelu", True, torch.float32)
    tensors["x"][7] = torch.nan
    y = through("triton")(**moved(tensors))
    assert y.isnan().any(1).nonzero().flatten().tolist() == [7]


def test_the_same_bits_twice():
    through, tensors, upstream = mlp_inputs(Case(20, 4, 33, 20, 2, "dropped"), "swiglu", True, torch.float32)
    tensors, upstream = moved(tensors), upstream.to(DEVICE)
    first, second = (run_with_grads(through("triton"), tensors, upstream) for _ in range(2))
    assert_equal(first, second)


def test_rows_per_token_is_only_for_speed():
    results = []
    for per_token in (True, False):
        torch.manual_seed(0)
        through, tensors, upstream = mlp_inputs(CASES["dropped"], "gelu", True, torch.float32, per_token)
        results.append(run_with_grads(through("triton"), moved(tensors), upstream.to(DEVICE)))
    assert_equal(*results)


def test_forward_alone_keeps_nothing():
    through, tensors, _ = mlp_inputs(CASES["odd"], "swiglu", True, torch.float32)
    tensors, function = moved(tensors), through("triton")
    y = function(**tensors)
    assert not y.requires_grad
    leaves = {name: t.clone().requires_grad_() for name, t in tensors.items()}
    assert torch.equal(function(**leaves), y)
    with torch.no_grad():
        assert torch.equal(function(**leaves), y)
    with torch.inference_mode():
        assert torch.equal(function(**tensors), y)


def test_second_derivative_is_refused():
    through, tensors, _ = mlp_inputs(CASES["odd"], "gelu", True, torch.float32)
    leaves = {name: t.requires_grad_() for name, t in moved(tensors).items()}
    (dx,) = torch.autograd.grad(through("triton")(**leaves).square().sum(), leaves["x"], create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative; use backend='reference'"):
        dx.sum().backward()


def test_autocast_computes_in_half_and_returns_full_gradients():
    through, tensors, upstream = mlp_inputs(Case(9, 3, 8, 16, 2), "swiglu", True, torch.float32)
    tensors, upstream, function = moved(tensors), upstream.to(DEVICE), through("triton")
    with torch.autocast(DEVICE.type, torch.float16):
        got = run_with_grads(function, tensors, upstream)
    assert got["out"].dtype == torch.float16
    assert {t.dtype for name, t in got.items() if name != "out"} == {torch.float32}
    halves = {name: t if name == "weights" else t.half() for name, t in tensors.items()}
    half = run_with_grads(function, halves, upstream)
    assert_equal(got, {name: t.to(got[name].dtype) for name, t in half.items()})
