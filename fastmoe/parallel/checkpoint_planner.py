"""Pieces as `torch.distributed.checkpoint` writes and reads them."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint import DefaultLoadPlanner, LoadPlan, Metadata, SavePlan, SavePlanner, WriteItem
from torch.distributed.checkpoint.default_planner import create_default_global_save_plan
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import ReadItem, TensorWriteData, WriteItemType
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from fastmoe.parallel.checkpoint_check import missing_rows, some
from fastmoe.parallel.global_state import Piece

CHUNK_BYTES = 4 << 20


class PieceSavePlanner(SavePlanner):
    """Each process writes its own pieces; of a piece that several hold, the one with least to write so far.

    A buffer may differ between processes, and is taken from the first that has it.
    """

    def __init__(self, pieces: Iterable[Piece]) -> None:
        self.items: list[WriteItem] = []
        self.tensors: dict[MetadataIndex, Tensor] = {}
        self.buffers: set[str] = set()
        for piece in pieces:
            if piece.buffer:
                self.buffers.add(piece.name)
            for offset, chunk in chunks(piece):
                index = MetadataIndex(piece.name, offset)
                self.tensors[index] = chunk
                self.items.append(_write_item(index, chunk, piece.shape))

    def set_up_planner(self, state_dict: Any, storage_meta: Any = None, is_coordinator: bool = False) -> None:
        """Nothing: the pieces are known."""

    def create_local_plan(self) -> SavePlan:
        return SavePlan(self.items, planner_data=self.buffers)

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        """Who writes what, and what the checkpoint will hold.

        Raises:
            ValueError: a tensor of which a part is on no process.
        """
        plans, metadata = create_default_global_save_plan(_without_duplicates(all_plans))
        for name, tensor in metadata.state_dict_metadata.items():
            assert isinstance(tensor, TensorStorageMetadata)
            if rows := missing_rows(tensor):
                raise ValueError(f"no process has {some(rows)} of the {tensor.size[0]} along dimension 0 of {name!r}")
        return plans, metadata

    def finish_plan(self, new_plan: SavePlan) -> SavePlan:
        return new_plan

    def resolve_data(self, write_item: WriteItem) -> Tensor:
        return self.tensors[write_item.index]


def chunks(piece: Piece) -> Iterable[tuple[tuple[int, ...], Tensor]]:
    """What is written as one, with its offset in the whole tensor.

    Whoever reads a part of a chunk reads all of it: experts are cut into chunks of `CHUNK_BYTES`, or of one expert,
    so that a process that will hold some of them has little more to read.
    """
    local = piece.local
    if piece.layer is None or not local.numel():
        return [(piece.offset, local)] if local.numel() or piece.whole else []
    rows = max(1, CHUNK_BYTES // (local[0].numel() * local.element_size()))
    starts = range(0, len(local), rows)
    return [((piece.offset[0] + i, *piece.offset[1:]), local[i : i + rows]) for i in starts]


def _write_item(index: MetadataIndex, chunk: Tensor, shape: tuple[int, ...]) -> WriteItem:
    assert index.offset is not None
    return WriteItem(
        index,
        WriteItemType.SHARD,
        tensor_data=TensorWriteData(
            ChunkStorageMetadata(index.offset, chunk.shape),
            TensorProperties.create_from_tensor(chunk),
            torch.Size(shape),
        ),
    )


def _without_duplicates(plans: Sequence[SavePlan]) -> list[SavePlan]:
    buffers = set().union(*(plan.planner_data for plan in plans))
    holders: defaultdict[MetadataIndex, list[int]] = defaultdict(list)
    items: dict[MetadataIndex, WriteItem] = {}
    for rank, plan in enumerate(plans):
        for item in plan.items:
            holders[item.index].append(rank)
            items.setdefault(item.index, item)
    kept: list[list[WriteItem]] = [[] for _ in plans]
    load = [0] * len(plans)
    for index, ranks in holders.items():
        rank = ranks[0] if index.fqn in buffers else min(ranks, key=load.__getitem__)
        kept[rank].append(items[index])
        data = items[index].tensor_data
        assert data is not None
        load[rank] += math.prod(data.chunk.sizes) * data.properties.dtype.itemsize
    return [replace(plan, items=own, planner_data=None) for plan, own in zip(plans, kept, strict=True)]


class PieceLoadPlanner(DefaultLoadPlanner):
    """Reads into the pieces of this process what overlaps them."""

    def __init__(self, pieces: Iterable[Piece], metadata: Metadata) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self.pieces, self.saved = {piece.name: piece for piece in pieces}, metadata.state_dict_metadata

    def create_local_plan(self) -> LoadPlan:
        reads: list[ReadItem] = []
        for name, piece in self.pieces.items():
            if piece.local.numel():
                saved = self.saved[name]
                assert isinstance(saved, TensorStorageMetadata)
                box = ChunkStorageMetadata(torch.Size(piece.offset), piece.local.shape)
                reads += create_read_items_for_chunk_list(name, saved, [box])
        return LoadPlan(reads)

    def lookup_tensor(self, index: MetadataIndex) -> Tensor:
        return self.pieces[index.fqn].local
