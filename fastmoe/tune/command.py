"""The command line of `fastmoe tune`."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import tyro

from fastmoe.bench.presets import parse_shape
from fastmoe.kernels.registry import BACKENDS
from fastmoe.kernels.triton.tiles import family, load_tiles, save_tiles, user_table
from fastmoe.tune.problems import SHAPES, TOY_SHAPES, cases

DESCRIPTION = """Measure tiles for the Triton kernels on this machine's GPU and keep the fastest.

Each product of each layer is computed by every tile that is tried, and by PyTorch's F.grouped_mm where that can serve;
what is right is timed in turns. Whoever wins stands in the table from then on, problem by problem, so that Ctrl-C loses
nothing."""
FOR_THE_INTERPRETER = "Triton's interpreter runs on the CPU: its times mean nothing, and tiles go to family 'cpu'"


@dataclasses.dataclass(frozen=True)
class Command:
    shapes: tuple[str, ...] = ()
    """TxExDxHxK, as 8192x128x2048x768x8; forward alone where all T*K rows are 256 or less, as in decoding. If none is
    given, the layers of well-known models."""
    dtypes: tuple[str, ...] = ()
    """float32, bfloat16 or float16; bfloat16 if none is given."""
    activations: tuple[str, ...] = ("swiglu", "gelu")
    """One that is gated and one that is not serve for all."""
    seconds: float = 1800.0
    """Time for all of it."""
    out: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """The table to write to; the user's own, which layers read, if none is given."""


def main(arguments: Sequence[str]) -> int:
    """Run the command; 0: done; 1: a kernel is wrong; 2: it cannot be run as asked; 130: interrupted."""
    command = tyro.cli(Command, prog="fastmoe tune", description=DESCRIPTION, args=list(arguments))
    if (reason := BACKENDS["triton"].available()) is not None:
        print(f"fastmoe tune: {reason}, so there is nothing to measure", file=sys.stderr)
        return 2
    try:
        return _tune(command)
    except (ValueError, OSError) as error:
        print(f"fastmoe tune: {error}", file=sys.stderr)
        return 2


def _tune(command: Command) -> int:
    from fastmoe.tune.run import Outcome, default_device, interpreting, tune  # Triton is there

    if not command.seconds > 0:
        raise ValueError(f"seconds must be above 0, got {command.seconds}")
    path, device = _table(command.out), default_device()
    shapes = tuple(map(parse_shape, command.shapes)) or (TOY_SHAPES if interpreting() else SHAPES)
    dtypes = command.dtypes or ("float32" if interpreting() else "bfloat16",)
    total = len(cases(shapes, dtypes, command.activations))
    outcomes: list[Outcome] = []

    def report(outcome: Outcome) -> None:
        outcomes.append(outcome)
        print(outcome, flush=True)
        for message in outcome.wrong:
            print(f"fastmoe tune: {message}", file=sys.stderr)
        if outcome.best_ms is not None:
            save_tiles(path, family(device), {outcome.key: outcome.best})

    print(FOR_THE_INTERPRETER if interpreting() else f"{total} problems on a GPU of family {family(device)}")
    try:
        tune(shapes, dtypes, command.activations, device, command.seconds, report)
        status = 1 if any(outcome.wrong for outcome in outcomes) else 0
    except KeyboardInterrupt:
        status = 130
    saved = sum(outcome.best_ms is not None for outcome in outcomes)
    print(f"{saved} of {total} problems are in {path}")
    return status


def _table(out: Path | None) -> Path:
    """Where to write; a file that is something else is not written over."""
    if out is None:
        return user_table()
    load_tiles(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    return out
