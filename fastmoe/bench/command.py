"""The command line of `fastmoe bench`."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

import tyro
from rich.console import Console

from fastmoe.bench.plot import plot
from fastmoe.bench.presets import PRESETS, Preset, parse_shape
from fastmoe.bench.report import show_row
from fastmoe.bench.run import Settings, run, save

DESCRIPTION = """Time one MoE layer's routed MLP beside every other way to compute it.

All contenders have the same weights and routing, run in one process in turns, and are timed only after their output and
gradients were found equal to the reference's in float64. Writes NAME.json and NAME.png."""


@dataclasses.dataclass(frozen=True)
class Command:
    preset: Literal["cpu", "fastmoe-paper", "hf", "gpu-large", "gpu-decode", "gpu-dense", "gpu-paper", "gpu-hf"] = "cpu"
    """What to run where no flag says otherwise."""
    shapes: tuple[str, ...] = ()
    """TxExDxHxK, as 2048x64x512x1024x2; forward and backward."""
    decode: tuple[str, ...] = ()
    """The same, forward alone, without gradients."""
    dtypes: tuple[str, ...] = ()
    """PyTorch's names, as float32 bfloat16."""
    activations: tuple[str, ...] = ()
    """As gelu swiglu."""
    contenders: tuple[str, ...] = ()
    """Names as in the table; ours and the dense MLP always run."""
    device: Literal["cpu", "cuda"] | None = None
    """Where to run."""
    rounds: int = 15
    """How many times each contender runs, one after the other."""
    seconds: float = 30.0
    """A contender whose runs of one problem would take longer sits out rounds."""
    memory: bool = True
    """Measure the extra memory of forward and backward, ours and dense, in processes of their own."""
    out: Annotated[Path, tyro.conf.arg(metavar="FOLDER")] = Path(".")
    """Where to write."""
    name: str | None = None
    """Name of the files; the preset's if none is given."""


def chosen(command: Command) -> Preset:
    """The preset with what the flags change; shapes given by flag replace all of the preset's."""
    changes: dict = {
        name: value for name in ("dtypes", "activations", "contenders", "device") if (value := getattr(command, name))
    }
    if command.shapes or command.decode:
        changes["shapes"] = tuple(map(parse_shape, command.shapes))
        changes["decode"] = tuple(map(parse_shape, command.decode))
    return dataclasses.replace(PRESETS[command.preset], **changes)


def main(arguments: Sequence[str]) -> int:
    """Run the command; 0: done; 2: it cannot be run as asked."""
    command = tyro.cli(Command, prog="fastmoe bench", description=DESCRIPTION, args=list(arguments))
    console = Console(highlight=False)
    try:
        preset = chosen(command)
        if command.rounds < 1:
            raise ValueError(f"rounds must be at least 1, got {command.rounds}")
        if not command.seconds >= 0:
            raise ValueError(f"seconds must be at least 0, got {command.seconds}")
        if "/" in (command.name or ""):
            raise ValueError(f"name must be a file's name, without a folder, got {command.name!r}")
        command.out.mkdir(parents=True, exist_ok=True)
        path = command.out / f"{command.name or command.preset}.json"

        def done(result: dict) -> None:
            show_row(console, result["rows"][-1])
            save(result, path)

        result = run(preset, Settings(command.rounds, command.seconds, command.memory), done)
    except (ValueError, OSError) as error:
        print(f"fastmoe bench: {error}", file=sys.stderr)
        return 2
    for skipped in result["skipped"]:
        shape = ", ".join(f"{letter} {size}" for letter, size in skipped["shape"].items())
        console.print(f"skipped: {shape}, {skipped['dtype']}, {skipped['activation']}: {skipped['reason']}")
    if not result["rows"]:
        return 2
    plot(result, path.with_suffix(".png"))
    console.print(f"wrote {path} and {path.with_suffix('.png')}")
    return 0
