"""Differences between what each process holds and what one process has alone."""

from __future__ import annotations

import math
from collections import defaultdict
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from fastmoe.check.report import Difference
from fastmoe.check.training import GRADIENTS, QUANTITIES, WEIGHTS, Record
from fastmoe.parallel.global_state import Piece
from fastmoe.parallel.hidden import take_hidden

FLOOR = 1e-3


class Entry(NamedTuple):
    """Of one tensor of the reference: its name, its shape, what a difference is divided by, and its own difference."""

    quantity: str
    name: str
    shape: tuple[int, ...]
    scale: float
    alone: float


def entries(reference: Record, again: Record) -> list[Entry]:
    """All tensors of the reference, quantity by quantity, beside a second run of the same."""
    scales = scales_of(reference)
    ordered = sorted(reference.pieces.items(), key=lambda item: QUANTITIES.index(item[0][0]))
    return [
        Entry(*key, piece.shape, scales[key], difference(again.pieces[key], piece.local, scales[key]))
        for key, piece in ordered
    ]


def scales_of(reference: Record) -> dict[tuple[str, str], float]:
    """The greatest absolute value of each tensor; of gradients and weights at least `FLOOR` of the greatest of all.

    Without the floor, rounding would be the whole of a gradient that is zero but for rounding.
    """
    largest = {key: greatest(piece.local) for key, piece in reference.pieces.items()}
    floors: defaultdict[str, float] = defaultdict(float)
    for (quantity, _), value in largest.items():
        if quantity in (GRADIENTS, WEIGHTS):
            floors[quantity] = max(floors[quantity], FLOOR * value)
    return {key: max(value, floors[key[0]]) for key, value in largest.items()}


def compare(record: Record, reference: Record | None, known: list[Entry], device: torch.device) -> list[Difference]:
    """All processes call it with what they hold; the first one has the reference, and sends it tensor by tensor."""
    found = torch.full((len(known),), -1.0, dtype=torch.float64, device=device)
    for i, (quantity, name, shape, scale, _) in enumerate(known):
        whole = torch.empty(shape, dtype=torch.float64, device=device)
        if reference is not None:
            whole.copy_(reference.pieces[quantity, name].local)
        dist.broadcast(whole, 0)
        if (piece := record.pieces.get((quantity, name))) is not None:
            found[i] = difference(piece, whole, scale)
    dist.all_reduce(found, dist.ReduceOp.MAX)
    found[found < 0] = math.inf  # no process holds it
    pairs = zip(known, found.tolist(), strict=True)
    return [Difference(entry.quantity, entry.name, layout, entry.alone) for entry, layout in pairs]


def difference(piece: Piece, whole: Tensor, scale: float) -> float:
    """The greatest difference between a piece and its part of the whole tensor, over `scale`; NaN counts as infinite.

    Raises:
        ValueError: the piece is of a tensor of another shape.
    """
    if piece.shape != tuple(whole.shape):
        raise ValueError(
            f"{piece.name} is {tuple(whole.shape)} on one process and {piece.shape} on many: the first dimension of "
            "what the model returns must be as long as its share of the batch, or a multiple"
        )
    apart = greatest(piece.local.to(whole.device, torch.float64) - part_of(piece, whole).to(torch.float64))
    return 0.0 if apart == 0 else apart / scale if scale else math.inf


def part_of(piece: Piece, whole: Tensor) -> Tensor:
    """What a process that holds the piece should have of it."""
    if (hidden := piece.hidden) is not None:
        return take_hidden(hidden.experts, hidden.param, whole.narrow(0, piece.offset[0], len(piece.local)))
    sizes = zip(piece.offset, piece.local.shape, strict=True)
    return whole[tuple(slice(start, start + size) for start, size in sizes)]


def greatest(x: Tensor) -> float:
    """The greatest absolute value; infinity if there is a NaN."""
    value = x.abs().max().item() if x.numel() else 0.0
    return math.inf if math.isnan(value) else value
