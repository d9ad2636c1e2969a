"""`torch.compile(fullgraph=True)`: the numbers of eager, and no compilation for every token count."""

import shutil

import pytest
import torch
from helpers import gradients
from torch._dynamo.testing import CompileCounterWithBackend

import fastmoe
from fastmoe.kernels.native.library import load

COUNTS = [7, 9, 33, 128]


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def build(**options):
    return fastmoe.MoE(8, 4, 2, d_hidden=12, **options).double()


OPTIONS = {
    "plain": {},
    "gated": {"activation": "swiglu", "bias": False},
    "shared": {"shared_d_hidden": 6, "router_options": {"z_loss_weight": 0.01}},
    "callable": {"activation": torch.tanh},
    "one_expert_a_token": {"top_k": 1},
}


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("masked", [False, True])
def test_training(name, masked):
    layer = fastmoe.MoE(8, 4, **({"top_k": 2, "d_hidden": 12} | OPTIONS[name])).double()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, fullgraph=True, backend=counter)
    for count in COUNTS:
        x, upstream = torch.randn(2, count, 8, dtype=torch.float64)
        mask = (torch.rand(count) < 0.7,) if masked else ()
        results = []
        for run in (layer, compiled):
            layer.zero_grad()
            leaf = x.clone().requires_grad_()
            y = run(leaf, *mask)
            y.backward(upstream)
            results.append({"y": y.detach(), "x": leaf.grad, **gradients(layer)})
            results[-1]["load"] = fastmoe.stats(layer)[""].load
        for key, expected in results[0].items():
            torch.testing.assert_close(results[1][key], expected, msg=lambda m, key=key: f"{key}: {m}")
    assert 1 <= counter.frame_count <= 2


@pytest.mark.parametrize("masked", [False, True])
def test_evaluation(masked):
    layer = build().eval()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, fullgraph=True, backend=counter)
    with torch.no_grad():
        for count in COUNTS:
            x = torch.randn(count, 8, dtype=torch.float64)
            mask = (torch.rand(count) < 0.7,) if masked else ()
            torch.testing.assert_close(compiled(x, *mask), layer(x, *mask))
    assert 1 <= counter.frame_count <= 2


@pytest.mark.skipif(not any(map(shutil.which, ("c++", "g++", "clang++"))), reason="inductor needs a C++ compiler")
def test_autocast_and_the_default_compiler():
    """Through inductor, where a wrong stride or dtype of a fake tensor would show."""
    layer = build(activation="geglu").float()
    x, upstream = torch.randn(2, 16, 8)
    results = []
    for run in (layer, torch.compile(layer, fullgraph=True)):
        layer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            y = run(x.t().contiguous().t())
        y.backward(upstream.bfloat16())
        results.append({"y": y.detach(), **gradients(layer)})
    assert results[1]["y"].dtype == torch.bfloat16
    for key, expected in results[0].items():
        torch.testing.assert_close(
            results[1][key], expected, rtol=2e-2, atol=2e-2, msg=lambda m, key=key: f"{key}: {m}"
        )


def test_a_loss_scale_that_changes():
    """A tensor as loss scale is not baked into the graph."""
    layer = build()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, fullgraph=True, backend=counter)
    x = torch.randn(20, 8, dtype=torch.float64)
    for scale in (1.0, 0.25, 7.0):
        fastmoe.set_aux_loss_scale(layer, torch.tensor(scale))
        results = []
        for run in (layer, compiled):
            layer.zero_grad()
            (0 * run(x)).sum().backward()
            results.append(layer.router.proj.weight.grad.clone())
        torch.testing.assert_close(results[1], results[0])
        assert results[0].abs().max() > 0
    assert counter.frame_count == 1


@pytest.mark.skipif(isinstance(load(), str), reason=f"no native library: {load()}")
@pytest.mark.parametrize("backend", ["auto", "native"])
def test_the_native_backend_compiles_too(backend):
    layer = fastmoe.MoE(32, 4, 2, d_hidden=64, backend=backend)
    plain = fastmoe.MoE(32, 4, 2, d_hidden=64, backend="torch")
    plain.load_state_dict(layer.state_dict())
    compiled = torch.compile(layer, fullgraph=True)
    for tokens in (5, 9):
        x = torch.randn(tokens, 32)
        torch.testing.assert_close(compiled(x), plain(x))
    compiled(x).square().sum().backward()
    plain(x).square().sum().backward()
    for a, b in zip(layer.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-5)
