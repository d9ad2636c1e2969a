"""Nothing waits for the device; everything can be captured in a graph; bits do not depend on what else runs."""

from contextlib import contextmanager

import pytest
import torch
from gpu_cases import half, on_both, on_gpu, problem, results

import fastmoe
from fastmoe import kernels
from fastmoe.bench.gate import check
from fastmoe.bench.graphs import in_graph
from fastmoe.bench.plain import grouped_mm as grouped_mm_contender
from fastmoe.bench.plain import ours

pytest.importorskip("triton")


@contextmanager
def no_wait(device):
    """PyTorch raises where the host would wait."""
    if device == "cpu":
        yield
        return
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def backward(*outputs):
    torch.autograd.backward(outputs, [torch.ones_like(y) for y in outputs])


def score(p, leaves):
    scores, weights, _ = kernels.score_topk(leaves["logits"], p.shape[4], backend="triton")
    backward(scores, weights)


def plan_of(p):
    return kernels.plan(p.ids_TK.reshape(-1), p.shape[1], backend="triton")


def grouped_mm(p, leaves):
    plan = plan_of(p)
    rows = leaves["x"][p.token_N[plan.order_N]]
    backward(kernels.grouped_mm(rows, leaves["w1"], plan.offsets_E, leaves["b1"], backend="triton"))


def combine(p, leaves):
    plan, weights_N = plan_of(p), leaves["weights"].reshape(-1)
    rows = leaves["x"][p.token_N]
    backward(kernels.combine(rows, p.token_N, weights_N, plan, p.shape[0], backend="triton"))


def expert_mlp(per_token):
    def run(p, leaves):
        arguments = (leaves[name] for name in ("w1", "b1", "w2", "b2"))
        y = kernels.expert_mlp(
            leaves["x"], p.token_N, leaves["weights"].reshape(-1), plan_of(p), *arguments,
            activation=p.activation, rows_per_token=p.shape[4] if per_token else 0, backend="triton",
        )  # fmt: skip
        backward(y)

    return run


OPS = {
    "score_topk": score,
    "grouped_mm": grouped_mm,
    "combine": combine,
    "expert_mlp": expert_mlp(True),
    "expert_mlp, any rows": expert_mlp(False),
}


@on_both
@pytest.mark.parametrize("name", OPS)
def test_no_kernel_waits(device, name):
    p = problem(device, (512, 8, 128, 256, 2), (6, 3, 16, 16, 2), activation="swiglu")
    E = p.shape[1]
    leaves = {"x": p.x_TD, "weights": p.weights_TK, "w1": p.w1, "w2": p.w2}
    leaves |= {"b1": torch.zeros_like(p.w1[..., 0]), "b2": torch.zeros_like(p.w2[..., 0])}
    leaves["logits"] = torch.randn(p.shape[0], E, device=device)
    leaves = {name: leaf.detach().requires_grad_() for name, leaf in leaves.items()}
    OPS[name](p, leaves)  # compiles
    with no_wait(device):
        OPS[name](p, leaves)


def layer_on(device, tokens):
    D, H = (16, 16) if device == "cpu" else (256, 512)
    layer = fastmoe.MoE(D, 8, 2, d_hidden=H, backend="triton").to(device, half(device))
    return layer, torch.randn(tokens, D, device=device, dtype=half(device), requires_grad=True)


@on_both
def test_no_layer_waits(device):
    layer, x = layer_on(device, 3 if device == "cpu" else 300)
    layer(x).sum().backward()
    with no_wait(device):
        layer(x).sum().backward()
        with torch.no_grad():
            layer(x)


@on_both
@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
def test_the_same_bits_always(device, activation):
    p = problem(device, (4096, 64, 512, 512, 4), (20, 4, 16, 16, 2), activation=activation)
    expected = results(p)
    if device == "cuda":
        other, a = torch.cuda.Stream(), torch.randn(4096, 4096, device=device)
        with torch.cuda.stream(other):
            for _ in range(100):
                a @ a
    for _ in range(2 if device == "cpu" else 5):
        assert all(torch.equal(got, e) for got, e in zip(results(p), expected, strict=True))


@on_both
def test_a_layer_gives_the_same_bits_always(device):
    layer, x = layer_on(device, 3 if device == "cpu" else 4000)

    def run():
        layer.zero_grad()
        x.grad = None
        y = layer(x)
        y.backward(torch.ones_like(y))
        return [y.detach(), x.grad, *(p.grad for p in layer.parameters())]

    assert all(torch.equal(a, b) for a, b in zip(run(), run(), strict=True))


def captured(call):
    """`(graph, what the call gave)`, warmed up on a stream of its own, as PyTorch asks for."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        made = call()
    return graph, made


@on_gpu
@pytest.mark.parametrize("tokens", [1, 8, 64])
def test_decoding_in_a_graph(tokens):
    layer, x = layer_on("cuda", tokens)
    layer.eval()
    with torch.no_grad():
        graph, y = captured(lambda: layer(x))
        for _ in range(3):
            x.copy_(torch.randn_like(x))  # other experts are chosen
            graph.replay()
            torch.testing.assert_close(y, layer(x), rtol=0, atol=1e-3)


@on_gpu
@pytest.mark.parametrize("build", [ours, grouped_mm_contender])
def test_contenders_in_a_graph(build):
    p = problem("cuda", (4, 32, 256, 128, 4), (), backward=False)
    assert check(p, in_graph(build)(p)) > 0


@on_gpu
def test_training_in_a_graph():
    layer, x = layer_on("cuda", 256)
    upstream = torch.randn_like(x)

    def step():
        layer.zero_grad()
        x.grad = None
        y = layer(x)
        y.backward(upstream)
        return [y.detach(), x.grad, *(p.grad for p in layer.parameters())]

    graph, made = captured(step)
    for _ in range(3):
        x.data.copy_(torch.randn_like(x))
        graph.replay()
        got = [t.clone() for t in made]
        for g, expected in zip(got, step(), strict=True):
            torch.testing.assert_close(g, expected, rtol=2e-2, atol=2e-2)
