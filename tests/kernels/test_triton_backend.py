"""The `triton` backend: what it takes, when it is chosen, and the layer through it."""

import pytest
import torch
from helpers import assert_measured, gradients

pytest.importorskip("triton")

from triton_cases import DEVICE

import fastmoe
from fastmoe import kernels
from fastmoe.kernels import registry
from fastmoe.kernels.triton import backend as module
from fastmoe.kernels.triton import score

IDS = torch.tensor([1, 0, 1])


@pytest.fixture
def compiled(monkeypatch):
    """As if Triton's interpreter were off."""
    monkeypatch.setattr(module, "_interpreting", lambda: False)


def test_it_is_available():
    assert fastmoe.backends()["triton"] == "available"


def test_limits_are_the_kernels():
    assert (module._MAX_SCORED, module._MAX_K) == (score.MAX_EXPERTS, score.MAX_K)


def test_without_triton(monkeypatch):
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None)
    assert fastmoe.backends()["triton"] == "Triton is not installed"
    with pytest.raises(ValueError, match="backend 'triton' cannot serve plan: Triton is not installed"):
        kernels.plan(IDS.to(DEVICE), 2, backend="triton")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu(compiled):
    assert fastmoe.backends()["triton"] == "there is no CUDA or ROCm device"


@pytest.mark.skipif(torch.version.hip is not None, reason="AMD's GPUs have no compute capability")
@pytest.mark.parametrize(
    ("capability", "expected"),
    [((7, 5), "it needs compute capability 8.0, the GPU has 7.5"), ((8, 0), "available")],
)
def test_compute_capability(capability, expected, compiled, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda i: [(9, 0), capability][i])
    module._gpu_is_too_old.cache_clear()
    try:
        assert fastmoe.backends()["triton"] == expected
    finally:
        module._gpu_is_too_old.cache_clear()


def refusals():
    """`(call, reason)` for each kernel."""
    rows, weight = torch.randn(3, 4).to(DEVICE), torch.randn(2, 5, 4).to(DEVICE)
    ids = IDS.to(DEVICE)
    plan = kernels.plan(ids, 2, backend="reference")
    mlp = (torch.randn(2, 5, 4).to(DEVICE), None, torch.randn(2, 4, 5).to(DEVICE), None)
    double = [None if t is None else t.double() for t in mlp]
    weights = torch.ones(3, device=DEVICE)
    options = {"backend": "triton"}
    float64 = "it knows float32, bfloat16 and float16, got torch.float64"
    return [
        (lambda: kernels.plan(ids, 4097, **options), "plan: it takes up to 4096 experts, got 4097"),
        (
            lambda: kernels.grouped_mm(rows.double(), weight.double(), plan.offsets_E, **options),
            f"grouped_mm: {float64}",
        ),
        (
            lambda: kernels.expert_mlp(rows.double(), ids, weights, plan, *double, activation="gelu", **options),
            f"expert_mlp: {float64}",
        ),
        (lambda: kernels.combine(rows.double(), ids, weights, plan, 3, **options), f"combine: {float64}"),
        (lambda: kernels.score_topk(rows.double(), 2, **options), "score_topk: it knows float32, got torch.float64"),
    ]


@pytest.mark.parametrize("number", range(5))
def test_what_is_refused(number):
    call, reason = refusals()[number]
    with pytest.raises(ValueError, match=f"backend 'triton' cannot serve {reason}"):
        call()


def test_tensors_on_a_cpu_need_the_interpreter(compiled):
    with pytest.raises(ValueError, match="cannot serve plan: it runs on a GPU, tensors are on cpu"):
        kernels.plan(IDS, 2, backend="triton")
    with pytest.raises(ValueError, match="cannot serve score_topk: it runs on a GPU, tensors are on cpu"):
        kernels.score_topk(torch.randn(3, 4), 2, backend="triton")


def test_auto_never_takes_it_on_a_cpu(monkeypatch):
    assert "triton" not in registry.PREFERENCE["cpu"]
    monkeypatch.setattr(registry.BACKENDS["triton"], "refuses", None)
    assert kernels.plan(IDS, 2).order_N.tolist() == [1, 0, 2]
    fastmoe.MoE(4, 3, d_hidden=5)(torch.randn(6, 4)).sum().backward()


def results(layer, x, mask, upstream):
    layer = layer.to(DEVICE)
    x = x.to(DEVICE, layer.router.proj.weight.dtype, copy=True).requires_grad_()
    with fastmoe.collect_aux_losses(layer) as losses:
        y = layer(x, mask.to(DEVICE))
    total = losses.total()
    ((y * upstream.to(y)).sum() + total).backward()
    return {"out": y.detach(), "x": x.grad, "loss": total.detach(), **gradients(layer)}, fastmoe.stats(layer)[""].load


LAYERS = {
    "topk": {},
    "sigmoid": {"activation": "swiglu", "bias": False, "router_options": {"score_function": "sigmoid"}},
    "one_expert_a_token": {"top_k": 1},
    "capacity": {"router_options": {"capacity_factor": 0.5}},
    "expert_choice": {"router": "expert_choice"},
    "shared": {"shared_d_hidden": 6},
    "callable": {"activation": torch.tanh},  # two grouped products
    "modules": {"expert": lambda: torch.nn.Linear(8, 8)},  # combine alone
}


@pytest.mark.parametrize("name", LAYERS)
def test_the_layer(name):
    """Outputs, balance losses and every gradient, with masked tokens."""
    x, upstream, mask = torch.randn(3, 7, 8), torch.randn(3, 7, 8), torch.rand(3, 7) < 0.8
    d_hidden = {} if "expert" in LAYERS[name] else {"d_hidden": 12}
    made = []
    for backend, dtype in (("triton", torch.float32), ("reference", torch.float32), ("reference", torch.float64)):
        torch.manual_seed(1)
        layer = fastmoe.MoE(8, 5, backend=backend, **(d_hidden | LAYERS[name])).to(dtype)
        if made:
            layer.load_state_dict(made[0][0].state_dict())
        made.append((layer, *results(layer, x, mask, upstream)))
    assert_measured(*(found for _, found, _ in made))
    assert made[0][2].tolist() == made[1][2].tolist()
    assert not made[0][1]["out"][~mask.to(DEVICE)].any()


def test_the_layer_calls_every_kernel_through_it(monkeypatch):
    called = []
    for op in ("plan", "expert_mlp"):
        kernel = getattr(registry.BACKENDS["triton"], op)
        spy = lambda *args, op=op, kernel=kernel: (called.append(op), kernel(*args))[1]  # noqa: E731
        monkeypatch.setattr(registry.BACKENDS["triton"], op, spy, raising=False)
    fastmoe.MoE(4, 3, d_hidden=5, backend="triton").to(DEVICE)(torch.randn(6, 4).to(DEVICE))
    assert called == ["plan", "expert_mlp"]
