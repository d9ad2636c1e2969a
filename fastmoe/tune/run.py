"""A whole run of `fastmoe tune`. Needs PyTorch and Triton."""

import time
from collections.abc import Callable, Sequence

import torch
import triton

from fastmoe.bench.presets import Shape
from fastmoe.kernels.registry import BACKENDS
from fastmoe.kernels.triton.tiles import Tile
from fastmoe.tune.measure import Outcome, measure
from fastmoe.tune.problems import SHAPES, Case, cases

SHARES = 3
"""Even shares of the time that one problem may take: the first of a kind compile what later ones find compiled."""


def interpreting() -> bool:
    """Whether Triton's interpreter runs the kernels, on the CPU, in times that mean nothing."""
    return bool(triton.knobs.runtime.interpret)


def default_device() -> torch.device:
    return torch.device("cpu" if interpreting() else "cuda")


def tune(
    shapes: Sequence[Shape] = SHAPES,
    dtypes: Sequence[str] = ("bfloat16",),
    activations: Sequence[str] = ("swiglu", "gelu"),
    device: torch.device | None = None,
    seconds: float = 1800.0,
    report: Callable[[Outcome], object] = print,
) -> dict[str, Tile | None]:
    """The fastest tile of every product of layers of these shapes, for `tiles.save_tiles`.

    Args:
        shapes: (T, E, D, H, K) each; with few rows, T*K, forward alone.
        dtypes: PyTorch's names.
        activations: as of `fastmoe.MoE`; one gated and one that is not are enough.
        device: the GPU; the CPU under Triton's interpreter.
        seconds: for all of it.
        report: called with each problem's outcome.

    Returns:
        Tiles by problem; None: `F.grouped_mm`. Problems that no time was left for are missing.

    Raises:
        ValueError: no device that Triton can use, an unknown dtype or activation.
    """
    device = default_device() if device is None else torch.device(device)
    if (reason := BACKENDS["triton"].available()) is not None:
        raise ValueError(reason)
    if interpreting() != (device.type == "cpu"):
        raise ValueError(f"Triton's interpreter is tuned on a CPU, and nothing else is; got device {str(device)!r}")
    todo = cases(shapes, dtypes, activations)
    found: dict[str, Tile | None] = {}
    end = time.monotonic() + seconds
    with torch.cuda.device(device if device.type == "cuda" else -1):
        for number, case in enumerate(todo):
            remaining = end - time.monotonic()
            if remaining <= 0:
                break
            outcome = _measured(case, device, min(remaining, SHARES * remaining / (len(todo) - number)))
            report(outcome)
            if outcome.best_ms is not None:
                found[outcome.key] = outcome.best
    return found


def _measured(case: Case, device: torch.device, seconds: float) -> Outcome:
    """A problem that the GPU has not the memory for is left out."""
    try:
        return measure(case, device, seconds)
    except torch.OutOfMemoryError:
        return Outcome(case.problem.key, reason="the GPU has not the memory")
    finally:
        if device.type == "cuda":
            torch.cuda.empty_cache()
