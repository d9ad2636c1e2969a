"""Tile sizes: measured ones from tables, others by a rule.

A table is JSON: GPU family, then problem, then tile; `null` for a tile means PyTorch's own `F.grouped_mm`. One is
shipped beside this file; `fastmoe tune` writes another into the user's cache folder, which goes first. A problem is one
product of one kind, in one dtype, sizes rounded up to powers of two, so that neighbours share a row.
"""

import json
import math
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

import torch

from fastmoe.kernels.cache import cache_folder

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


def choose_tile(problem: Problem, device: torch.device) -> Tile | None:
    """The tile for a problem; None: `F.grouped_mm` was measured to be faster."""
    name = family(device)
    for table in (_table(user_table()), _table(shipped_table())):
        found = table.get(name, {})
        if problem.key in found:
            tile = found[problem.key]
            return None if tile is None else Tile(**tile)
    return default_tile(problem, name)


def default_tile(problem: Problem, name: str) -> Tile:
    """A tile by rule, for a GPU of family `name`."""
    if name == "cpu":
        return Tile(16, 32, 16, group=2, split=2 if problem.kind == "product" and problem.num_rows <= 32 else 1)
    large_memory = name in ("sm80", "sm90", "sm100")
    tma = name in ("sm90", "sm100", "sm120")
    wide = problem.dtype == torch.float32
    if problem.kind == "weight":
        columns = 256 if large_memory and not wide else 128
        return Tile(128, columns, 32 if wide or not large_memory else 64, 8, 8, 3)
    if problem.num_rows <= DECODE_ROWS or problem.rows_per_expert <= 16:
        return Tile(16, 32 if problem.gated else 64, 64 if wide or not large_memory else 128, 4, 4, 4, tma, 4)
    if problem.rows_per_expert <= 64:
        return Tile(64, 64 if problem.gated else 128, 32 if wide else 64, 8, 4, 3, tma, 2)
    two = problem.gated and problem.kind == "forward"
    if not large_memory or wide:
        return Tile(128, 64 if two else 128, 32, 8, 8, 3 if large_memory else 2, tma)
    return Tile(128, 128 if two or problem.kind == "backward" else 256, 64, 8, 8, 3, tma)


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
def _table(path: Path) -> dict[str, dict[str, dict | None]]:
    return json.loads(path.read_text()) if path.exists() else {}


def save_tiles(path: Path, name: str, tiles: dict[str, Tile | None]) -> None:
    """Put measured tiles of GPU family `name` into the table at `path`; what else it holds stays."""
    table = json.loads(path.read_text()) if path.exists() else {}
    table.setdefault(name, {}).update({key: None if tile is None else asdict(tile) for key, tile in tiles.items()})
    unfinished = path.with_suffix(".unfinished")
    unfinished.write_text(json.dumps(table, indent=1, sort_keys=True) + "\n")
    unfinished.replace(path)
    _table.cache_clear()
