"""The `fastmoe` command. A subcommand is one row of `COMMANDS`, imported when it is called."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import sys
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Command:
    """`module` has `main(arguments) -> exit status`; `needs` are the imports of the extra that it takes."""

    summary: str
    module: str
    extra: str
    needs: tuple[str, ...]


COMMANDS = {
    "train": Command(
        "train a language model, dense and as an MoE",
        "fastmoe.train.command",
        "train",
        ("matplotlib", "numpy", "polars", "rich", "tensorboard", "tyro"),
    ),
    "compare": Command(
        "draw two runs by steps, time and FLOPs",
        "fastmoe.train.compare_command",
        "train",
        ("matplotlib", "numpy", "tyro"),
    ),
    "data": Command("fetch a data set: enwik8", "fastmoe.train.data_command", "train", ("rich",)),
    "bench": Command(
        "time one MoE layer beside every other way to compute it",
        "fastmoe.bench.command",
        "bench",
        ("matplotlib", "rich", "tyro"),
    ),
    "tune": Command("measure the fastest tiles for this machine's GPU", "fastmoe.tune.command", "bench", ("tyro",)),
    "consolidate": Command(
        "write a checkpoint as one safetensors file",
        "fastmoe.parallel.consolidate_command",
        "checkpoint",
        ("safetensors",),
    ),
    "check-layout": Command("check that a model trains on many processes as on one", "fastmoe.check.command", "", ()),
    "report": Command("write a run's report as one HTML file", "fastmoe.train.report_command", "train", ("plotly",)),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a subcommand and return its exit status."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    parser = build_parser()
    if not arguments:
        parser.print_help()
        return 2
    name = parser.parse_args(arguments[:1]).command
    command = COMMANDS[name]
    missing = [module for module in command.needs if importlib.util.find_spec(module) is None]
    if missing:
        print(f"fastmoe {name} needs {', '.join(missing)}: pip install 'fastmoe[{command.extra}]'", file=sys.stderr)
        return 2
    return importlib.import_module(command.module).main(arguments[1:])


def build_parser() -> argparse.ArgumentParser:
    from fastmoe import __version__

    commands = "\n".join(f"  {name:<12} {command.summary}" for name, command in COMMANDS.items())
    parser = argparse.ArgumentParser(
        prog="fastmoe",
        description="Mixture-of-Experts for PyTorch.",
        epilog=f"commands:\n{commands}\n\n`fastmoe COMMAND --help` lists the options of a command.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"fastmoe {__version__}")
    parser.add_argument("command", choices=COMMANDS, metavar="COMMAND")
    return parser
