"""What this process holds of an optimizer's state; each tensor lies as the parameter that it belongs to."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from fastmoe.parallel.checkpoint_values import PLAIN
from fastmoe.parallel.global_state import ModelState, Piece
from fastmoe.parallel.global_state_placement import placed

Shape = tuple[int, ...]


class Owned(NamedTuple):
    """A parameter of the optimizer: the number of its group, itself, and its piece of the model."""

    group: int
    param: Tensor
    piece: Piece


@dataclass(frozen=True)
class Saved:
    """What a checkpoint says of a state tensor."""

    shape: Shape
    dtype: torch.dtype


def owned(optimizer: Optimizer, model: ModelState) -> Iterator[Owned]:
    """Every parameter of the optimizer.

    Raises:
        ValueError: one that is not the model's.
    """
    for g, group in enumerate(optimizer.param_groups):
        for i, param in enumerate(group["params"]):
            if (piece := model.of.get(param)) is None:
                raise ValueError(
                    f"parameter {i} of the optimizer's group {g}, of shape {tuple(param.shape)}, is not one of the "
                    "model's: build the optimizer from the model's parameters, after fastmoe.parallelize"
                )
            yield Owned(g, param, piece)


def state_pieces(optimizer: Optimizer, model: ModelState) -> list[Piece]:
    """The pieces of all state tensors, named `<parameter>.<key>`.

    Raises:
        ValueError: a shape of which other layouts could make no sense.
    """
    return [
        _piece(piece, key, value)
        for _, param, piece in owned(optimizer, model)
        for key, value in optimizer.state.get(param, {}).items()
        if isinstance(value, Tensor)
    ]


def state_values(optimizer: Optimizer, model: ModelState) -> dict[str, dict[str, Any]]:
    """State that is no tensor, by parameter and key.

    Raises:
        ValueError: what is neither a tensor nor a plain value.
    """
    values: dict[str, dict[str, Any]] = {}
    for _, param, piece in owned(optimizer, model):
        for key, value in optimizer.state.get(param, {}).items():
            if not isinstance(key, str) or "." in key:
                raise ValueError(
                    f"the optimizer's state of {piece.name!r} has a key {key!r}, which is not a string without dots"
                )
            if isinstance(value, Tensor):
                continue
            if not isinstance(value, PLAIN):
                raise ValueError(
                    f"the optimizer's state {key!r} of {piece.name!r} must be a tensor or a plain value, got "
                    f"{type(value).__name__}"
                )
            values.setdefault(piece.name, {})[key] = value
    return values


def _piece(of: Piece, key: str, value: Tensor) -> Piece:
    name = f"{of.name}.{key}"
    if isinstance(value, DTensor):
        local, shape, offset = placed(name, value)
        layer = of.layer if shape[:1] == of.shape[:1] else None
        return Piece(name, local, of.shape if of.hidden else shape, offset, layer, of.hidden)
    local, held, rows = value.detach(), tuple(value.shape), _rows(of)
    if held == tuple(of.local.shape):
        return Piece(name, local, of.shape, of.offset, of.layer, of.hidden)
    if of.whole or not held or (math.prod(held) == 1 and (rows != 1 or key == "step")):
        return Piece(name, local, held, (0,) * len(held))
    if held[0] == rows and (rows != 1 or len(held) == len(of.shape)):
        return Piece(name, local, (of.shape[0], *held[1:]), (of.offset[0], *(0 for _ in held[1:])), of.layer)
    raise ValueError(
        f"the optimizer's state {name!r} must be one number, or shaped like the parameter, of which this process holds "
        f"{tuple(of.local.shape)}; or have that shape's first dimension; got {held}"
    )


def _rows(of: Piece) -> int | None:
    """How many rows of a parameter this process holds, if it holds rows."""
    return len(of.local) if of.shape and tuple(of.local.shape[1:]) == of.shape[1:] else None


def fresh(of: Piece, param: Tensor, key: str, saved: Saved, options: Mapping[str, Any]) -> tuple[Tensor, Piece]:
    """An uninitialised state tensor for a parameter, and the piece to load it by.

    Raises:
        ValueError: a shape that does not go with the parameter's.
    """
    name, shape, rows = f"{of.name}.{key}", saved.shape, _rows(of)
    layer, hidden, whole = of.layer, None, tuple(param.shape) if saved.shape == of.shape else shape
    if shape == of.shape:
        sizes, offset, hidden = tuple(of.local.shape), of.offset, of.hidden
    elif of.whole or math.prod(shape) == 1:
        sizes, offset, layer = shape, (0,) * len(shape), None
    elif rows is not None and shape[0] == of.shape[0]:
        sizes, offset = (rows, *shape[1:]), (of.offset[0], *(0 for _ in shape[1:]))
    else:
        raise ValueError(f"{name!r} has shape {shape}, which does not go with that of the parameter, {of.shape}")
    on_cpu = key == "step" and not options.get("capturable") and not options.get("fused")
    local = torch.empty(sizes, dtype=saved.dtype, device="cpu" if on_cpu else param.device)
    piece = Piece(name, local, shape, offset, layer, hidden)
    if not isinstance(param, DTensor) or (sizes == shape != of.shape):
        return local, piece
    stride = torch.empty(whole, device="meta").stride()
    value = DTensor.from_local(
        local, param.device_mesh, param.placements, run_check=False, shape=torch.Size(whole), stride=stride
    )
    return value, piece
