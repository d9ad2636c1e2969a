"""The norm of all gradients, wherever they are."""

from __future__ import annotations

import math

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fastmoe._errors import check_number
from fastmoe._processes import collective
from fastmoe.dispatch import AllToAllDispatcher
from fastmoe.experts import MLPExperts, local
from fastmoe.model import moe_layers
from fastmoe.parallel.engines import Parallel, find_parallel
from fastmoe.parallel.layout import Layout
from fastmoe.parallel.shard import expert_parameters


@torch.no_grad()
def clip_grad_norm_(model: nn.Module, max_norm: float, norm_type: float = 2.0) -> Tensor:
    """Scale gradients so that their norm is at most `max_norm`: that of the whole model, the same on any layout.

    As `torch.nn.utils.clip_grad_norm_`, but experts of other processes count too, and each once. All processes call it.

    Args:
        model: one that was given to `fastmoe.parallelize`, or any other.
        max_norm: not negative; `math.inf` only measures.
        norm_type: p of the p-norm, above 0; `math.inf` is the largest absolute value.

    Returns:
        The norm before clipping, a scalar, the same on every process. Not finite if a gradient is not.

    Raises:
        ValueError: a norm that is no number, or negative.
    """
    if max_norm != math.inf:
        check_number("max_norm", max_norm)
    if norm_type != math.inf and not check_number("norm_type", norm_type):
        raise ValueError(f"norm_type must be above 0, got {norm_type!r}")
    parallel = find_parallel(model)
    if parallel is None:
        if any(isinstance(layer.dispatcher, AllToAllDispatcher) for layer in moe_layers(model).values()):
            raise ValueError(f"{type(model).__name__} is a part of a parallel model: give the whole of it")
        norm = nn.utils.clip_grad_norm_(model.parameters(), max_norm, norm_type)
        return norm.full_tensor() if hasattr(norm, "full_tensor") else norm
    norm = _norm(model, parallel, norm_type)
    scale = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    for parameter in model.parameters():
        if parameter.grad is not None:
            local(parameter.grad).mul_(scale)
    return norm


def _norm(model: nn.Module, parallel: Parallel, norm_type: float) -> Tensor:
    """Each process adds what it holds, divided by the number of processes that hold the same."""
    everyone = parallel.layout.everyone
    pieces = pieces_of(model, parallel.layout)
    total: Tensor | None = None
    for parameter in model.parameters():
        grad = None if parameter.grad is None else local(parameter.grad)
        if grad is None or not grad.numel():
            continue
        dtype = torch.promote_types(grad.dtype, torch.float32)  # a half's largest number is soon reached
        norm = torch.linalg.vector_norm(grad, norm_type, dtype=dtype).to(torch.float64)
        if norm_type == math.inf:
            total = norm if total is None else torch.maximum(total, norm)
        else:
            part = norm.pow(norm_type) * (pieces[parameter] / everyone.size())
            total = part if total is None else total + part
    if total is None:
        total = torch.zeros((), dtype=torch.float64, device=next(model.parameters()).device)
    if norm_type == math.inf:
        total = total.masked_fill(total.isnan(), math.inf)  # the largest of NaN and a number may be the number
    with collective():
        dist.all_reduce(
            total, dist.ReduceOp.MAX if norm_type == math.inf else dist.ReduceOp.SUM, group=everyone.get_group()
        )
    return total if norm_type == math.inf else total.pow(1 / norm_type)


def pieces_of(model: nn.Module, layout: Layout) -> dict[nn.Parameter, int]:
    """Into how many different pieces each parameter is split over the processes of the mesh."""
    spread_over = 1 if layout.experts is None else layout.experts.size()
    pieces = {parameter: _shards(parameter) for parameter in model.parameters()}
    for layer in moe_layers(model).values():
        for name, parameter in expert_parameters(layer).items():
            if isinstance(layer.experts, MLPExperts) and hasattr(parameter, "placements"):
                continue  # its placements tell of the spread too
            pieces[parameter] *= spread_over * (1 if name == "b2" else layer.experts.tp.size)
    return pieces


def _shards(parameter: nn.Parameter) -> int:
    placements, mesh = getattr(parameter, "placements", ()), getattr(parameter, "device_mesh", None)
    sizes = zip(placements, () if mesh is None else mesh.shape, strict=True)
    return math.prod(size for placement, size in sizes if not placement.is_replicate())
