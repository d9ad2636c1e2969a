"""Tensor parallelism inside experts: each process holds a part of every expert's hidden width."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fastmoe._processes import Processes
from fastmoe.experts import Experts, MLPExperts, is_gated


def check_hidden(experts: Experts, tp: int) -> None:
    """Whether so many processes can share the hidden width.

    Raises:
        ValueError: they cannot; says why.
    """
    if not isinstance(experts, MLPExperts) or not isinstance(experts.activation, str):
        raise ValueError("tp splits the hidden width of built-in experts with a named activation; use tp='slice'")
    if experts.d_hidden % tp:
        raise ValueError(f"d_hidden must be a multiple of tp={tp}, got {experts.d_hidden}")
    if experts.dropout:
        raise ValueError("dropout draws other numbers on every process: tp cannot split experts that have it")


def split_hidden(experts: Experts, tp: Processes) -> None:
    """Keep this process's part of w1, b1 and w2."""
    assert isinstance(experts, MLPExperts)
    experts.tp = tp
    for name in ("w1", "b1", "w2"):
        whole = getattr(experts, name)
        if whole is not None:
            setattr(experts, name, nn.Parameter(take_hidden(experts, name, whole.detach()), whole.requires_grad))


def take_hidden(experts: MLPExperts, name: str, whole: Tensor) -> Tensor:
    """This process's part of a parameter (or of what is shaped like it); `b2` is not split."""
    dim = split_dimension(name)
    if dim is None or experts.tp.size == 1:
        return whole
    halves = whole.chunk(2, dim) if _has_halves(experts, name) else (whole,)
    return torch.cat([half.chunk(experts.tp.size, dim)[experts.tp.rank] for half in halves], dim)


def gather_hidden(experts: MLPExperts, name: str, part: Tensor) -> Tensor:
    """The whole of which each process holds the part that `take_hidden` gives it."""
    dim = split_dimension(name)
    if dim is None or experts.tp.size == 1:
        return part
    return join_hidden(experts.tp.gather(part).unbind(), dim, halves=_has_halves(experts, name))


def join_hidden(parts: Sequence[Tensor], dim: int, *, halves: bool) -> Tensor:
    """The whole of these parts, by process; `halves`: each has its part of a gate's half, then of what it gates."""
    if not halves:
        return torch.cat(list(parts), dim)
    return torch.cat([part.chunk(2, dim)[half] for half in (0, 1) for part in parts], dim)


def split_dimension(name: str) -> int | None:
    """Along which dimension a parameter is split; None for `b2`, which is not."""
    return {"w1": 1, "b1": 1, "w2": 2, "b2": None}[name]


def _has_halves(experts: MLPExperts, name: str) -> bool:
    return name != "w2" and is_gated(experts.activation)
