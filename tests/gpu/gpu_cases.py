"""What the tests on a GPU share. Most bodies run with toy sizes on a CPU too, under Triton's interpreter."""

import pytest
import torch
from torch import Tensor

from fastmoe.bench.problem import Problem

ON_GPU = torch.cuda.is_available()
GPU = (pytest.mark.gpu, pytest.mark.skipif(not ON_GPU, reason="no CUDA or ROCm device"))
CPU = pytest.mark.skipif(ON_GPU, reason="Triton's interpreter is for machines without a GPU")
on_both = pytest.mark.parametrize("device", [pytest.param("cpu", marks=CPU), pytest.param("cuda", marks=GPU)])


def on_gpu(test):
    """A test for a GPU alone."""
    for mark in GPU:
        test = mark(test)
    return test


def half(device: str) -> torch.dtype:
    """The interpreter has no bfloat16 products."""
    return torch.float16 if device == "cpu" else torch.bfloat16


def problem(device: str, shape: tuple, toy: tuple, dtype: torch.dtype | None = None, **options) -> Problem:
    """On a CPU of the `toy` shape; in half precision if no dtype is given."""
    return Problem(toy if device == "cpu" else shape, dtype or half(device), device=device, **options)


def results(p: Problem, backend: str = "triton") -> list[Tensor]:
    """The output and, if there is a backward, the gradients of x, routing weights, w1 and w2."""
    for leaf in p.leaves:
        leaf.grad = None
    with torch.set_grad_enabled(p.backward):
        y_TD = p.routed_mlp(backend, *p.leaves)
    if not p.backward:
        return [y_TD]
    y_TD.backward(p.grad_TD)
    return [y_TD.detach(), *p.grads()]
