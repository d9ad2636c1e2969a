"""Experts whose hidden width is split: their tensors are gathered before a save, and sliced after a load."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from fastmoe.experts import MLPExperts
from fastmoe.parallel.hidden import gather_hidden, split_dimension, take_hidden

if TYPE_CHECKING:
    from fastmoe.parallel.global_state import Piece


@dataclass(frozen=True)
class HiddenPart:
    """`param` of `experts`, or what is shaped like it."""

    experts: MLPExperts
    param: str

    @property
    def split(self) -> bool:
        return split_dimension(self.param) is not None

    def whole_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        dim = split_dimension(self.param)
        return tuple(size * self.experts.tp.size if i == dim else size for i, size in enumerate(shape))


def gather_pieces(pieces: Iterable[Piece]) -> list[Piece]:
    """Pieces of whole hidden width, to be saved; every process must call it with its own."""
    return [
        piece
        if (hidden := piece.hidden) is None
        else replace(piece, local=gather_hidden(hidden.experts, hidden.param, piece.local), hidden=None)
        for piece in pieces
    ]


def buffers_for(pieces: Iterable[Piece]) -> list[Piece]:
    """Pieces of whole hidden width, to be loaded into; where nothing is split, the given ones."""
    return [
        piece
        if piece.hidden is None
        else replace(piece, local=piece.local.new_empty(len(piece.local), *piece.shape[1:]), hidden=None)
        for piece in pieces
    ]


@torch.no_grad()
def take_pieces(pieces: Iterable[Piece], loaded: Iterable[Piece]) -> None:
    """Copy from `buffers_for(pieces)`, now loaded, what belongs to this process."""
    for piece, whole in zip(pieces, loaded, strict=True):
        if (hidden := piece.hidden) is not None:
            piece.local.copy_(take_hidden(hidden.experts, hidden.param, whole.local))
