"""The layer and its kernels on a GPU, against the reference on the CPU in float64."""

import pytest
import torch
from torch import Tensor

import fastmoe

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA or ROCm device"),
]

# relative error of output and of every gradient, in norm
LIMITS = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 5e-3}


def results(layer: fastmoe.MoE, x: Tensor, upstream: Tensor) -> list[Tensor]:
    x = x.clone().requires_grad_()
    with fastmoe.collect_aux_losses(layer) as losses:
        y = layer(x)
    (y.double() * upstream.to(y.device)).sum().add(losses.total().to(y.device)).backward()
    return [t.detach().double().cpu() for t in (y, x.grad, *(p.grad for p in layer.parameters()))]  # type: ignore[union-attr]


@pytest.mark.parametrize("dtype", list(LIMITS))
@pytest.mark.parametrize(("width", "hidden"), [(64, 128), (60, 36)], ids=["aligned", "odd"])
@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
@pytest.mark.parametrize("tokens", [0, 1, 257])
def test_layer_on_gpu(dtype: torch.dtype, width: int, hidden: int, activation: str, tokens: int) -> None:
    torch.manual_seed(0)
    # float32 products must be float32 for the comparison
    torch.backends.cuda.matmul.allow_tf32 = False
    exact = fastmoe.MoE(width, 8, 2, d_hidden=hidden, activation=activation, backend="reference")
    exact = exact.to(dtype).double()
    x, upstream = torch.randn(tokens, width).to(dtype), torch.randn(tokens, width, dtype=torch.float64)
    layer = fastmoe.MoE(width, 8, 2, d_hidden=hidden, activation=activation).to("cuda", dtype)
    layer.load_state_dict(exact.state_dict())
    for got, expected in zip(results(layer, x.cuda(), upstream), results(exact, x.double(), upstream), strict=True):
        assert got.shape == expected.shape
        assert (got - expected).norm() <= LIMITS[dtype] * expected.norm() + 1e-6


def test_nothing_waits_for_the_device() -> None:
    layer = fastmoe.MoE(64, 8, 2, d_hidden=128).to("cuda", torch.bfloat16)
    x = torch.randn(128, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    layer(x).sum().backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        layer(x).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
