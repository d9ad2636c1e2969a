"""Tile sizes: measured ones from tables, others by a rule.

A table is JSON: GPU family, then problem, then tile; `null` for a tile means PyTorch's own `F.grouped_mm`. One is
shipped beside this file; `fastmoe tune` writes another into the user's cache folder, which goes first. A problem is one
product of one kind, in one dtype, sizes rounded up to powers of two, so that neighbours share a row.
"""

import json
import logging
import math
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path

import torch

from fastmoe.kernels.cache import cache_folder

logger = logging.getLogger("fastmoe")

KINDS = ("forward", "product", "turned", "backward", "weight")
"""x @ w1 with the activation; rows @ w; rows @ w, turned; dy @ w2 with the activation's gradient; a.T @ b by expert."""

DECODE_ROWS = 256


@dataclass(frozen=True)
class Tile:
    """Size of one tile, and how programs walk it.

    Attributes:
        rows, columns, depth: of the output tile, and of one step of the reduction. Of kind "weight": columns of a,
            columns of b, and rows in one step.
        group: row tiles walked together, for L2.
        warps, stages: Triton's `num_warps`, `num_stages`.
        tma: loads by Hopper's tensor memory accelerator, through tensor descriptors.
        programs: persistent programs on each multiprocessor.
        split: parts of the reduction, each a tile of its own.
    """

    rows: int
    columns: int
    depth: int
    group: int = 8
    warps: int = 8
    stages: int = 3
    tma: bool = False
    programs: int = 1
    split: int = 1


@dataclass(frozen=True)
class Problem:
    """One product: of N rows over E experts, each with a matrix of that many outputs and inputs."""

    kind: str
    dtype: torch.dtype
    num_rows: int
    num_experts: int
    outputs: int
    inputs: int
    gated: bool = False

    @property
    def rows_per_expert(self) -> int:
        return max(1, self.num_rows // max(1, self.num_experts))

    @property
    def key(self) -> str:
        sizes = (self.rows_per_expert, self.num_experts, self.outputs, self.inputs)
        rounded = "x".join(str(2 ** math.ceil(math.log2(max(1, size)))) for size in sizes)
        dtype = str(self.dtype).removeprefix("torch.")
        decode = " decode" if self.num_rows <= DECODE_ROWS else ""
        return f"{self.kind}{' gated' if self.gated else ''} {dtype} {rounded}{decode}"


def choose_tile(problem: Problem, device: torch.device, grouped_mm: bool) -> Tile | None:
    """The tile for a problem; None: `F.grouped_mm` was measured to be faster, and may serve, as `grouped_mm` says."""
    name = family(device)
    for table in (_table(user_table()), _table(shipped_table())):
        found = table.get(name)
        if found and (key := problem.key) in found and (grouped_mm or found[key] is not None):
            return found[key]
    return default_tile(problem, name)


def default_tile(problem: Problem, name: str) -> Tile:
    """A tile by rule, for a GPU of family `name`: as large as registers and shared memory hold without spilling."""
    if name == "cpu":
        return Tile(16, 32, 16, group=2, split=2 if problem.kind == "product" and problem.num_rows <= 32 else 1)
    large = name in ("sm80", "sm90", "sm100", "sm103")  # shared memory
    wide = problem.dtype == torch.float32
    tma = name in ("sm90", "sm100", "sm103", "sm120", "sm121") and not wide
    stages = 3 if name.startswith("sm") else 2
    if problem.kind == "weight":
        if large and not wide and min(problem.outputs, problem.inputs) >= 64:
            return Tile(128, 256, 64, 8, 8, 5)
        return Tile(128, 128, 16 if wide else 32, 8, 8, stages)
    if problem.rows_per_expert <= 16:
        tile = Tile(16, 32 if problem.gated else 64, 128 if large and not wide else 64, 4, 4, stages, tma, 4)
        return replace(tile, split=_split(problem, tile))
    if problem.rows_per_expert <= 64:
        return Tile(64, 64 if problem.gated else 128, 32 if wide else 64, 8, 8 if wide else 4, stages, tma, 2)
    two = problem.gated and problem.kind == "forward"
    if wide or not large:
        return Tile(128, 64 if two else 128, 16 if two and wide else 32, 8, 8, stages, tma)
    if problem.kind == "backward":
        return Tile(128, 128, 64, 8, 8, 4 if name == "sm90" else 3, tma)
    return Tile(128, 128 if two else 256, 64, 8, 8, 3, tma)


def _split(problem: Problem, tile: Tile) -> int:
    """Parts of the reduction, each of two steps at least, with which a few rows' product has 256 tiles."""
    if problem.num_rows > DECODE_ROWS or problem.kind not in ("forward", "product"):
        return 1
    tiles = min(problem.num_rows, problem.num_experts) * math.ceil(problem.outputs / (1 + problem.gated) / tile.columns)
    wanted = min(256 / max(1, tiles), problem.inputs / (2 * tile.depth))
    return 2 ** max(0, math.floor(math.log2(wanted))) if wanted >= 1 else 1


@cache
def family(device: torch.device) -> str:
    """ "sm90" and its like, AMD's "gfx942" and its like, or "cpu" for the interpreter."""
    if device.type == "cpu":
        return "cpu"
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        return properties.gcnArchName.split(":")[0]
    return f"sm{properties.major}{properties.minor}"


def user_table() -> Path:
    return cache_folder() / "tiles.json"


def shipped_table() -> Path:
    return Path(__file__).with_name("tiles.json")


@cache
def _table(path: Path) -> dict[str, dict[str, Tile | None]]:
    """The table at `path`; an empty one, with a warning, where what stands there is none."""
    try:
        return load_tiles(path)
    except ValueError as error:
        logger.warning("%s; ignored. Delete it, or make it anew by `fastmoe tune`", error)
        return {}


def load_tiles(path: Path) -> dict[str, dict[str, Tile | None]]:
    """Tiles by GPU family and problem; none where there is no such file.

    Raises:
        ValueError: what stands there is no table of tiles.
    """
    if not path.exists():
        return {}
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
        return {name: {key: _tile(row) for key, row in rows.items()} for name, rows in table.items()}
    except (ValueError, TypeError, AttributeError, OSError) as error:
        raise ValueError(f"{path} is not a table of tiles: {error}") from error


def _tile(row: dict | None) -> Tile | None:
    if row is None:
        return None
    tile = Tile(**row)
    sizes = (tile.rows, tile.columns, tile.depth)
    counts = (*sizes, tile.group, tile.warps, tile.stages, tile.programs, tile.split)
    if type(tile.tma) is not bool or not all(type(count) is int and count > 0 for count in counts):
        raise ValueError(f"a tile has whole numbers above 0, and tma true or false; got {row}")
    if min(sizes) < 16 or any(size & (size - 1) for size in (*sizes, tile.warps)):
        raise ValueError(f"rows, columns and depth must be powers of two from 16, warps a power of two; got {row}")
    return tile


def save_tiles(path: Path, name: str, tiles: dict[str, Tile | None]) -> None:
    """Put measured tiles of GPU family `name` into the table at `path`; what else it holds stays."""
    table = dict(_table(path))
    table[name] = table.get(name, {}) | tiles
    rows = {
        name: {key: None if tile is None else asdict(tile) for key, tile in found.items()}
        for name, found in table.items()
    }
    unfinished = path.with_suffix(".unfinished")
    unfinished.write_text(json.dumps(rows, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    unfinished.replace(path)
    _table.cache_clear()
