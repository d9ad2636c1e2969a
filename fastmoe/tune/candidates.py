"""The tiles that are tried, most promising first: what a budget cuts off is the end of a list.

Compiled for sm80 to sm120 and gfx942 to see what they take: those that spill much are not here. So is TMA in float32.
"""

import dataclasses

import torch

from fastmoe.kernels.triton.tiles import DECODE_ROWS, Problem, Tile

_TMA = ("sm90", "sm100", "sm103", "sm120", "sm121")

# rows, columns, depth, warps, stages; where a gated forward has two products at once, each has half of the columns
_Size = tuple[int, int, int, int, int]
_HALF: dict[str, tuple[_Size, ...]] = {
    "many": (
        (128, 256, 64, 8, 3), (128, 128, 64, 8, 3), (128, 256, 64, 8, 4), (128, 128, 64, 4, 4), (256, 128, 64, 8, 3),
        (64, 256, 64, 4, 4), (128, 128, 32, 4, 4), (128, 128, 64, 8, 2), (128, 64, 64, 4, 3), (128, 256, 32, 8, 2),
        (256, 128, 32, 8, 2), (128, 128, 32, 8, 2), (64, 128, 64, 4, 2), (64, 128, 32, 4, 3),
    ),
    "some": (
        (64, 128, 64, 4, 3), (64, 256, 64, 8, 3), (64, 128, 64, 4, 4), (32, 128, 64, 4, 4), (64, 256, 64, 8, 4),
        (32, 256, 64, 4, 3), (64, 64, 64, 4, 4), (64, 128, 128, 4, 3), (64, 128, 64, 4, 2), (64, 128, 32, 4, 3),
        (32, 64, 128, 4, 2), (64, 64, 64, 4, 2),
    ),
    "few": (
        (16, 64, 128, 4, 4), (16, 128, 64, 4, 4), (16, 128, 128, 4, 3), (16, 64, 256, 4, 3), (16, 64, 64, 4, 5),
        (32, 64, 128, 4, 3), (16, 256, 64, 4, 3), (16, 64, 64, 4, 2), (16, 128, 64, 4, 2), (16, 64, 128, 4, 2),
    ),
    "backward": (
        (128, 128, 64, 8, 4), (128, 128, 64, 8, 3), (128, 64, 64, 4, 4), (128, 64, 64, 8, 4), (64, 128, 64, 8, 4),
        (128, 128, 32, 8, 2), (64, 128, 32, 4, 3), (256, 64, 64, 8, 3), (64, 64, 64, 4, 4), (128, 64, 64, 8, 2),
        (128, 64, 32, 4, 3), (64, 128, 64, 8, 2),
    ),
    "weight": (
        (128, 256, 64, 8, 5), (128, 256, 64, 8, 3), (128, 128, 64, 8, 4), (128, 256, 32, 8, 4), (128, 128, 64, 4, 3),
        (256, 128, 64, 8, 3), (128, 128, 32, 8, 4), (128, 128, 64, 8, 2), (128, 64, 64, 4, 4), (64, 256, 64, 8, 3),
        (128, 128, 32, 8, 2), (64, 128, 64, 4, 3), (64, 64, 64, 4, 3), (64, 128, 32, 4, 2),
    ),
}  # fmt: skip
_FLOAT32: dict[str, tuple[_Size, ...]] = {
    "many": (
        (128, 128, 32, 8, 3), (128, 128, 16, 8, 3), (64, 128, 32, 8, 2), (128, 64, 32, 8, 3), (128, 64, 16, 4, 3),
        (64, 64, 32, 4, 3), (64, 128, 16, 4, 3), (64, 64, 16, 4, 3), (128, 128, 16, 8, 2), (128, 64, 32, 8, 2),
    ),
    "some": (
        (64, 64, 32, 4, 3), (64, 128, 32, 8, 3), (64, 64, 16, 4, 3), (32, 64, 32, 4, 3), (32, 128, 32, 4, 3),
        (64, 128, 16, 8, 3), (32, 64, 32, 4, 2), (32, 128, 16, 4, 3), (64, 64, 32, 4, 2), (64, 128, 32, 8, 2),
    ),
    "few": (
        (16, 64, 64, 4, 3), (16, 64, 32, 4, 4), (16, 128, 32, 4, 4), (16, 64, 128, 4, 3), (16, 128, 64, 4, 3),
        (32, 64, 64, 4, 3), (16, 64, 32, 4, 2), (16, 64, 64, 4, 2), (16, 128, 32, 4, 2),
    ),
    "backward": (
        (128, 128, 32, 8, 3), (128, 64, 32, 8, 3), (64, 128, 32, 8, 3), (64, 64, 32, 4, 3), (128, 64, 16, 8, 3),
        (64, 64, 16, 4, 3), (128, 128, 16, 8, 3), (64, 128, 32, 8, 2), (128, 64, 32, 8, 2),
    ),
    "weight": (
        (128, 128, 32, 8, 3), (128, 128, 16, 8, 3), (64, 128, 32, 8, 2), (128, 64, 32, 8, 3), (64, 64, 32, 4, 3),
        (128, 64, 16, 4, 3), (64, 128, 16, 4, 3), (64, 64, 16, 4, 3), (64, 64, 32, 4, 2), (128, 128, 32, 8, 2),
    ),
}  # fmt: skip
_INTERPRETED: tuple[_Size, ...] = ((16, 64, 16, 4, 2), (32, 64, 32, 4, 2))
_PROGRAMS = {"many": 1, "some": 2, "few": 4, "backward": 1, "weight": 1}
_MOST = {"many": 10, "some": 10, "few": 8, "backward": 10, "weight": 12}
_SPLIT, _PARTS = 4, (2, 4)


def candidates(problem: Problem, name: str, shared_memory: int) -> list[Tile]:
    """Tiles for a GPU of family `name` that has `shared_memory` bytes for a block of threads."""
    kind = list_of(problem)
    sizes = _INTERPRETED if name == "cpu" else (_FLOAT32 if problem.dtype == torch.float32 else _HALF)[kind]
    tiles = [
        Tile(rows, columns // _products(problem), depth, 8, warps, stages, False, _PROGRAMS[kind])
        for rows, columns, depth, warps, stages in sizes
    ]
    fitting = [tile for tile in tiles if least_shared_bytes(tile, problem) <= shared_memory][: _MOST[kind]]
    tma = name in _TMA and problem.kind != "weight" and problem.dtype != torch.float32
    choices = (True, False) if tma else (False,)
    both = [dataclasses.replace(tile, tma=choice) for tile in fitting for choice in choices]
    return both + _split(fitting[:_SPLIT], problem, tma)


def _split(tiles: list[Tile], problem: Problem, tma: bool) -> list[Tile]:
    """In decoding, whose programs are few: the reduction in parts, a gated forward as one plain product."""
    if problem.num_rows > DECODE_ROWS or problem.kind not in ("forward", "product"):
        return []
    return [
        dataclasses.replace(tile, columns=tile.columns * _products(problem), tma=tma, split=parts)
        for tile in tiles
        for parts in _PARTS
        if problem.inputs >= parts * tile.depth
    ]


def list_of(problem: Problem) -> str:
    """Which list a problem takes: by its kind, or by how many rows an expert has."""
    if problem.kind == "weight":
        return "weight"
    if problem.rows_per_expert <= 16:
        return "few"
    if problem.rows_per_expert <= 128:
        return "some"
    return "backward" if problem.kind == "backward" else "many"


def _products(problem: Problem) -> int:
    """How many products a tile has at once."""
    return 2 if problem.gated and problem.kind == "forward" else 1


def least_shared_bytes(tile: Tile, problem: Problem) -> int:
    """No tile gets by with less: the operands of all stages but one; of one where Triton may not overlap stages."""
    values = (tile.rows + tile.columns * _products(problem)) * tile.depth
    stages = 1 if problem.kind == "weight" else max(1, tile.stages - 1)
    return values * problem.dtype.itemsize * stages
