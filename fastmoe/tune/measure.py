"""One product by every tile that is tried: checked, then timed in turns."""

import math
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
import triton
from torch import Tensor

from fastmoe.bench.measure import shuffled
from fastmoe.kernels.triton.tiles import Tile, default_tile, family
from fastmoe.tune.candidates import candidates
from fastmoe.tune.problems import Case
from fastmoe.tune.stopwatch import Stopwatch
from fastmoe.tune.truth import truth, worst_error
from fastmoe.tune.work import Work

CLEARLY_FASTER = 0.98
ROUNDS, LEAST_ROUNDS = 15, 3


@dataclass(frozen=True)
class Outcome:
    """What was found for one problem.

    Attributes:
        default_ms: None: the default tile does not run, or is wrong.
        best_ms, best: the fastest, unless the default is as fast; tile None: `F.grouped_mm`; time None: nothing runs.
        timed, failed, left: how many were timed, did not run, and were left out for lack of time.
        wrong: a message for each tile with wrong results.
        reason: why there is nothing.
    """

    key: str
    default_ms: float | None = None
    best_ms: float | None = None
    best: Tile | None = None
    timed: int = 0
    failed: int = 0
    left: int = 0
    wrong: tuple[str, ...] = ()
    reason: str = ""

    def __str__(self) -> str:
        if self.reason:
            return f"{self.key}: left out, {self.reason}"
        default, best = ("does not run" if ms is None else f"{ms:.4g} ms" for ms in (self.default_ms, self.best_ms))
        tile = "" if self.best_ms is None else f" {named(self.best)}"
        counts = f"{self.timed} timed, {self.failed} failed, {len(self.wrong)} wrong, {self.left} left out"
        return f"{self.key}: default {default}, best {best}{tile} ({counts})"


def named(tile: Tile | None) -> str:
    """A tile in a few words."""
    if tile is None:
        return "F.grouped_mm"
    split = f" split {tile.split}" if tile.split > 1 else ""
    size = f"{tile.rows}x{tile.columns}x{tile.depth}, {tile.warps} warps, {tile.stages} stages"
    return f"{size}{', TMA' if tile.tma else ''}{split}"


def measure(case: Case, device: torch.device, seconds: float) -> Outcome:
    """Time every tile within `seconds`, of which two thirds may go into compiling and checking."""
    start = time.monotonic()
    default = default_tile(case.problem, family(device))
    work = Work(case, device)
    tiles = tiles_to_try(work, default, device)
    right, failed, wrong = check(work, tiles, start + seconds * 2 / 3)
    times = rounds(work, right, Stopwatch(device), 1 if device.type == "cpu" else ROUNDS, start + seconds)
    medians = {tile: statistics.median(found) for tile, found in times.items()}
    best = fastest(medians, default)
    left = len(tiles) - len(right) - failed - len(wrong)
    return Outcome(
        case.problem.key, medians.get(default), medians.get(best), best, len(right), failed, left, tuple(wrong)
    )


def tiles_to_try(work: Work, default: Tile, device: torch.device) -> list[Tile | None]:
    """The default first, then `F.grouped_mm`, which is None, where it may serve; none twice."""
    rivals: list[Tile | None] = [None] if work.takes_grouped_mm() else []
    found = candidates(work.problem, family(device), shared_memory(device))
    return list(dict.fromkeys([default, *rivals, *found]))


def shared_memory(device: torch.device) -> int:
    """Bytes that a block of threads may have, as Triton itself asks for them; the interpreter has no bound."""
    if device.type == "cpu":
        return 1 << 30
    index = torch.cuda.current_device() if device.index is None else device.index
    return triton.runtime.driver.active.utils.get_device_properties(index)["max_shared_mem"]


def check(work: Work, tiles: Sequence[Tile | None], deadline: float) -> tuple[list[Tile | None], int, list[str]]:
    """`(those with right results, how many do not run, a message for each wrong one)`; the first is always run."""
    expected = truth(work)
    limit = max(2 * torch.finfo(work.problem.dtype).eps, 2e-5)
    right: list[Tile | None] = []
    wrong, failed = [], 0
    for tile in tiles:
        if tile != tiles[0] and time.monotonic() > deadline:
            break
        try:
            got = results(work, tile)
        except Exception:  # whatever Triton's compiler raises, and what the driver refuses to launch
            if work.tokens_TD.device.type != "cpu":
                torch.cuda.synchronize()  # raises if the device is lost, and with it all that follows
            failed += 1
            continue
        error = worst_error(got, expected)
        if error < limit:
            right.append(tile)
        else:
            wrong.append(f"{tile or named(tile)} is wrong for {work.problem}: error {error:.2g}, limit {limit:.2g}")
    return right, failed, wrong


def results(work: Work, tile: Tile | None) -> list[Tensor]:
    """What a tile computes, with the device done; `F.grouped_mm` must not wait for it, as it does on some GPUs."""
    if work.tokens_TD.device.type == "cpu":
        return work.by(tile)
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error" if tile is None else before)
    try:
        got = work.by(tile)
    finally:
        torch.cuda.set_sync_debug_mode(before)
    torch.cuda.synchronize()
    return got


def rounds(
    work: Work, tiles: list[Tile | None], stopwatch: Stopwatch, most: int, deadline: float
) -> dict[Tile | None, list[float]]:
    """Milliseconds of each tile, round by round, each round in an order of its own."""
    names = {str(tile): tile for tile in tiles}
    times: dict[Tile | None, list[float]] = {tile: [] for tile in tiles}
    for number in range(most):
        if number >= LEAST_ROUNDS and time.monotonic() > deadline:
            break
        for name in shuffled(list(names), number):
            times[names[name]].append(stopwatch.milliseconds(partial(work.by, names[name])))
    return times


def fastest(medians: dict[Tile | None, float], default: Tile) -> Tile | None:
    """The default, unless another is clearly faster."""
    if not medians:
        return None
    best = min(medians, key=lambda tile: medians[tile])
    clearly = medians[best] < CLEARLY_FASTER * medians.get(default, math.inf)
    return best if clearly else default
