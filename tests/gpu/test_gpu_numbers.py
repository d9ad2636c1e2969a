"""The numbers of the layer and its kernels on a GPU, against the reference in float64."""

import pytest
import torch
from gpu_cases import on_both, on_gpu, problem, results
from torch import Tensor

import fastmoe
from fastmoe.bench.gate import relative_error

pytest.importorskip("triton")

# relative error of output and of every gradient, in norm
LIMITS = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 5e-3}
FLOOR = {torch.float32: 1e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4}  # some roundings


def layer_results(layer: fastmoe.MoE, x: Tensor, upstream: Tensor) -> list[Tensor]:
    x = x.clone().requires_grad_()
    with fastmoe.collect_aux_losses(layer) as losses:
        y = layer(x)
    (y.double() * upstream.to(y.device)).sum().add(losses.total().to(y.device)).backward()
    return [t.detach().double().cpu() for t in (y, x.grad, *(p.grad for p in layer.parameters()))]  # type: ignore[union-attr]


@on_gpu
@pytest.mark.parametrize("dtype", list(LIMITS))
@pytest.mark.parametrize(("width", "hidden"), [(64, 128), (60, 36)], ids=["aligned", "odd"])
@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
@pytest.mark.parametrize("tokens", [0, 1, 257])
def test_layer(dtype, width, hidden, activation, tokens):
    check_layer("cuda", dtype, width, hidden, activation, tokens)


@on_both
def test_a_small_layer(device):
    check_layer(device, torch.float32, 20, 12, "swiglu", 5)


def check_layer(device, dtype, width, hidden, activation, tokens):
    backend = "auto" if dtype == torch.float64 else "triton"
    exact = fastmoe.MoE(width, 8, 2, d_hidden=hidden, activation=activation, backend="reference")
    exact = exact.to(dtype).double()
    x, upstream = torch.randn(tokens, width).to(dtype), torch.randn(tokens, width, dtype=torch.float64)
    layer = fastmoe.MoE(width, 8, 2, d_hidden=hidden, activation=activation, backend=backend).to(device, dtype)
    layer.load_state_dict(exact.state_dict())
    for got, expected in zip(
        layer_results(layer, x.to(device), upstream), layer_results(exact, x.double(), upstream), strict=True
    ):
        assert got.shape == expected.shape
        assert (got - expected).norm() <= LIMITS[dtype] * expected.norm() + 1e-6


def assert_right(p):
    """At most twice as far from the truth as the reference in the same dtype, plus some roundings; NaN is not."""
    plain = [relative_error(got, t) for got, t in zip(results(p, "reference"), p.truth, strict=True)]
    errors = [relative_error(got, t) for got, t in zip(results(p), p.truth, strict=True)]
    for error, allowed in zip(errors, plain, strict=True):
        assert error <= 2 * allowed + FLOOR[p.dtype], (errors, plain)


SHAPES = {
    "aligned": ((2048, 8, 256, 512, 2), (8, 3, 32, 16, 2)),
    "odd": ((1003, 16, 200, 328, 3), (9, 3, 20, 12, 2)),
    "many_experts": ((2048, 256, 256, 128, 8), (5, 9, 16, 16, 3)),
    "one_expert": ((515, 1, 256, 512, 1), (9, 1, 16, 16, 1)),
}


@on_both
@pytest.mark.parametrize("activation", ["relu", "swiglu"])
@pytest.mark.parametrize("name", SHAPES)
def test_training(device, name, activation):
    assert_right(problem(device, *SHAPES[name], activation=activation))


@on_both
@pytest.mark.parametrize("tokens", [1, 4, 64])
def test_decoding(device, tokens):
    assert_right(
        problem(device, (tokens, 64, 512, 256, 8), (min(tokens, 4), 8, 16, 16, 2), activation="swiglu", backward=False)
    )


@on_both
def test_half_of_all_rows_on_one_expert(device):
    p = problem(device, (4096, 64, 256, 512, 2), (9, 4, 16, 16, 2))
    p.ids_TK[:, 0] = 1
    assert_right(p)


LARGE = [
    (65536, 64, 256, 4608, 8, "gelu"),  # pre-activations and hidden rows
    (65536, 64, 256, 2304, 8, "swiglu"),  # both halves of pre-activations
    (65536, 64, 4608, 256, 8, "gelu"),  # rows of the model's width
    (64, 544, 1024, 4096, 2, "gelu"),  # weights
]


@on_both
def test_more_than_2_to_the_31_elements(device):
    """Against float64 alone, and one problem after the other: each takes a good part of a GPU's memory."""
    for *shape, activation in LARGE:
        p = problem(device, tuple(shape), (4, 3, 16, 16, 2), activation=activation)
        if device == "cuda":
            T, E, D, H, K = shape
            assert max(T * K * H * (1 + p.gated), T * K * D, E * D * H) > 2**31
        got = results(p)
        errors = [relative_error(g, t) for g, t in zip(got, p.truth, strict=True)]
        for error in errors:
            assert error < LIMITS[torch.bfloat16], (shape, errors)
        del p, got
        torch.cuda.empty_cache()


@on_gpu
def test_compiled():
    layer = fastmoe.MoE(256, 8, 2, d_hidden=512, activation="swiglu").to("cuda", torch.bfloat16)
    x, upstream = torch.randn(2, 512, 256, device="cuda", dtype=torch.bfloat16)
    compiled = torch.compile(layer, fullgraph=True)
    found = []
    for run in (layer, compiled):
        layer.zero_grad()
        leaf = x.clone().requires_grad_()
        y = run(leaf)
        y.backward(upstream)
        found.append([y.detach(), leaf.grad, *(p.grad for p in layer.parameters())])
    for got, expected in zip(found[1], found[0], strict=True):
        assert relative_error(got, expected) < LIMITS[torch.bfloat16]


@on_gpu
def test_tf32_is_pytorchs_switch(monkeypatch):
    p = problem("cuda", (2048, 8, 256, 512, 2), (), torch.float32)
    switch = torch.backends.cuda.matmul
    monkeypatch.setattr(switch, "fp32_precision", "ieee")
    exact = results(p)
    monkeypatch.setattr(switch, "fp32_precision", "tf32")
    rounded = results(p)
    for name, e, r, t in zip(("y", "x", "weights", "w1", "w2"), exact, rounded, p.truth, strict=True):
        assert relative_error(e, t) < LIMITS[torch.float32], name
        assert LIMITS[torch.float32] < relative_error(r, t) < 5e-3, name
