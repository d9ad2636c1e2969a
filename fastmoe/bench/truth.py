"""What is right: the reference backend in float64."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastmoe import kernels

if TYPE_CHECKING:
    from fastmoe.bench.problem import Problem

CHUNK_BYTES = 1 << 30


def truth(p: "Problem") -> list[Tensor]:
    """The output and, if there is a backward, the gradients of x, routing weights, w1 and w2.

    Computed in float64, some experts at a time, so that large problems fit; kept in float32 at least.
    """
    dtype = kernels.accumulation_dtype(p.dtype)
    x_TD = p.x_TD.detach().double().requires_grad_(p.backward)
    y_TD, dx_TD = torch.zeros_like(x_TD, requires_grad=False), torch.zeros_like(x_TD, requires_grad=False)
    dweights_N = torch.zeros(p.ids_TK.numel(), device=p.device, dtype=torch.float64)
    dw1, dw2 = (torch.empty_like(w if p.backward else w[:0], dtype=dtype, requires_grad=False) for w in (p.w1, p.w2))
    for experts in chunks(p):
        rows_R, leaves, part_TD = _some(p, x_TD, experts)
        y_TD += part_TD.detach()
        if p.backward:
            grads = torch.autograd.grad(part_TD, leaves, p.grad_TD.double())
            dx_TD += grads[0]
            dweights_N[rows_R] = grads[1]
            dw1[experts], dw2[experts] = grads[2].to(dtype), grads[3].to(dtype)
    grads = (dx_TD.to(dtype), dweights_N.view_as(p.ids_TK), dw1, dw2)
    return [y_TD.to(dtype), *(grads if p.backward else ())]


def chunks(p: "Problem") -> Iterator[slice]:
    """All experts, as many at a time as take about a GiB in float64, weights and rows."""
    _, E, D, H, _ = p.shape
    each = 8 * (p.w1[0].numel() + p.w2[0].numel() + p.ids_TK.numel() // E * (D + 3 * H))
    step = max(1, CHUNK_BYTES // each)
    return (slice(first, min(first + step, E)) for first in range(0, E, step))


def _some(p: "Problem", x_TD: Tensor, experts: slice) -> tuple[Tensor, list[Tensor], Tensor]:
    """The rows of these experts, the leaves, and what the rows add to the output."""
    ids_N = p.ids_TK.reshape(-1)
    rows_R = ((ids_N >= experts.start) & (ids_N < experts.stop)).nonzero().flatten()
    parts = (p.weights_TK.reshape(-1)[rows_R], p.w1[experts], p.w2[experts])
    weights_R, w1, w2 = leaves = [t.detach().double().requires_grad_(p.backward) for t in parts]
    plan = kernels.plan(ids_N[rows_R] - experts.start, experts.stop - experts.start, backend="reference")
    y_TD = kernels.expert_mlp(
        x_TD, p.token_N[rows_R], weights_R, plan, w1, None, w2, None, activation=p.activation, backend="reference"
    )
    return rows_R, [x_TD, *leaves], y_TD
