"""A first pass on one process: whether the loss is one that can be divided, and how to train."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from fastmoe.check.problem import Problem
from fastmoe.parallel.clip import clip_grad_norm_


@dataclass(frozen=True)
class Settings:
    """Of clipping and of AdamW.

    Attributes:
        max_norm: half of the first step's gradient norm, so that clipping acts.
        eps: the root mean square of the clipped gradients. Rounding in gradients that are next to zero is then not
            blown up to whole steps, as a small eps would do.
    """

    max_norm: float
    eps: float


def probe(problem: Problem, shares: int, rounding: float) -> Settings:
    """Run a forward and a backward pass over the whole batch; the model is spent afterwards.

    Raises:
        ValueError: there is no gradient, or it is not finite; the loss is not the mean of those of equal shares.
    """
    model, batch = problem.model, problem.batch
    output = model(batch[0])
    loss = problem.loss_of(output, batch)
    if not loss.requires_grad:
        raise ValueError("the loss has no gradient: it must be computed from the model's output by operations with one")
    if not math.isfinite(loss.item()):
        raise ValueError(f"on one process the loss of the first step is {loss.item()}: there is nothing to compare")
    check_mean(problem, output, loss.item(), shares, rounding)
    loss.backward()
    return settings_for(model)


@torch.no_grad()
def check_mean(problem: Problem, output: object, whole: float, shares: int, rounding: float) -> None:
    """Only of a mean over the batch's rows is the mean over processes the loss of the whole batch."""
    total = 0.0
    for i in range(shares):
        part = partial(_part, i=i, shares=shares, rows=problem.rows)
        total += problem.loss_of(tree_map(part, output), tuple(map(part, problem.batch))).item()
    if not abs(total / shares - whole) <= rounding * max(abs(whole), abs(total / shares)):
        raise ValueError(
            f"the loss must be a mean over the batch's rows: of the whole batch it is {whole:.6g}, the mean over "
            f"{shares} equal shares is {total / shares:.6g}"
        )


def _part(x: Any, i: int, shares: int, rows: int) -> Any:
    """One of equal shares of a tensor that has rows; of anything else all."""
    if not isinstance(x, Tensor) or not x.dim():
        return x
    if len(x) % rows:
        raise ValueError(
            f"the model must return tensors whose first dimension is that of the batch, {rows}, or a multiple of it; "
            f"got {tuple(x.shape)}"
        )
    return x.tensor_split(shares)[i]


def settings_for(model: nn.Module) -> Settings:
    """Those that go with the gradients of a model that is all in this process."""
    norm = clip_grad_norm_(model, math.inf).item()
    if not 0 < norm < math.inf:
        raise ValueError(f"on one process the gradient norm of the first step is {norm}: there is nothing to compare")
    size = sum(p.numel() for p in model.parameters() if p.grad is not None)
    return Settings(norm / 2, norm / 2 / math.sqrt(size))
