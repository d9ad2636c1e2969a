"""Whether a checkpoint fits: found out from what it says of itself, before anything is loaded."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from fastmoe.parallel.global_state import ModelState, Piece

SHOWN = 8


@dataclass(frozen=True)
class Problem:
    """`what` has a `{}` for the items where there are any; those of all processes are shown together."""

    what: str
    items: tuple[str | int, ...] = ()


def report(head: str, problems: Iterable[Problem]) -> str:
    """All problems, one a line."""
    found: defaultdict[str, set[str | int]] = defaultdict(set)
    for problem in problems:
        found[problem.what].update(problem.items)
    lines = (what.replace("{}", some(sorted(items))) for what, items in sorted(found.items()))
    return "\n- ".join([head, *lines])


def some(items: Sequence[object]) -> str:
    """The first of them, and how many more."""
    shown = ("; " if any(" " in str(item) for item in items) else ", ").join(str(item) for item in items[:SHOWN])
    return shown if len(items) <= SHOWN else f"{shown} and {len(items) - SHOWN} more"


def compare_names(kind: str, here: Iterable[str], saved: Iterable[str], model: ModelState) -> Iterator[Problem]:
    """Names that only one side has; each process judges those that are not of other processes' experts."""
    here, saved = set(here), set(saved)
    experts_here, experts_saved = ({model.expert(name) for name in names} for names in (here, saved))
    for name in here - saved:
        if (expert := model.expert(name)) is None or expert in experts_saved:
            yield Problem(f"{kind} not in the checkpoint: {{}}", (name,))
        else:
            yield Problem(f"experts {{}} of layer {expert[0].name!r} are not in the checkpoint", (expert[1],))
    for name in saved - here:
        if model.elsewhere(name):
            continue
        if (expert := model.expert(name)) is None or expert in experts_here:
            yield Problem(f"{kind} in the checkpoint that are not here: {{}}", (name,))
        else:
            what = f"experts {{}} of layer {expert[0].name!r} are in the checkpoint but not in the model"
            yield Problem(what, (expert[1],))


def compare_tensors(pieces: Iterable[Piece], saved: Mapping[str, TensorStorageMetadata]) -> Iterator[Problem]:
    """Shapes and dtypes that differ, and parts that the checkpoint lacks; names that it lacks are passed over."""
    for piece in pieces:
        if (tensor := saved.get(piece.name)) is None:
            continue
        shape, dtype = tuple(tensor.size), tensor.properties.dtype
        if shape != piece.shape:
            yield _other_shape(piece, shape)
        elif dtype != piece.local.dtype:
            what = f"{piece.name}: {piece.local.dtype} here, {dtype} in the checkpoint"
            yield Problem("dtypes that differ (convert one side first): {}", (what,))
        elif rows := missing_rows(tensor):
            yield _incomplete(piece, rows)


def _other_shape(piece: Piece, shape: tuple[int, ...]) -> Problem:
    if piece.layer is not None and shape[1:] == piece.shape[1:]:
        return Problem(f"layer {piece.layer!r} has {piece.shape[0]} experts, the checkpoint {shape[0]}")
    return Problem("shapes that differ: {}", (f"{piece.name}: {piece.shape} here, {shape} in the checkpoint",))


def _incomplete(piece: Piece, rows: list[int]) -> Problem:
    if piece.layer is not None:
        return Problem(f"the checkpoint lacks experts {{}} of {piece.name}", tuple(rows))
    return Problem("tensors of which the checkpoint has only parts: {}", (piece.name,))


def missing_rows(tensor: TensorStorageMetadata) -> list[int]:
    """Indices along dimension 0 of which some part is in no chunk; chunks do not overlap."""
    volume = math.prod(tensor.size)
    if sum(math.prod(chunk.sizes) for chunk in tensor.chunks) == volume:
        return []
    if not tensor.size:
        return [0]
    volumes = [0] * tensor.size[0]
    for chunk in tensor.chunks:
        for row in range(chunk.offsets[0], chunk.offsets[0] + chunk.sizes[0]):
            volumes[row] += math.prod(chunk.sizes[1:])
    return [row for row, held in enumerate(volumes) if held != volume // tensor.size[0]]
