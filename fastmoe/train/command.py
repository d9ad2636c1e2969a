"""The command line of `fastmoe train`."""

from __future__ import annotations

import argparse
import importlib
import sys
import traceback
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Literal

import tyro
from rich.console import Console

from fastmoe.parallel import CollectiveError
from fastmoe.train.config import TrainConfig
from fastmoe.train.failure import RunError
from fastmoe.train.options import merge, preset, read_toml
from fastmoe.train.recipes import RECIPES, TABULAR, recipe
from fastmoe.train.run import run, set_up
from fastmoe.train.world import leave, leaving_when_it_fails, open_world

DESCRIPTION = f"""Train a byte-level language model: dense, as a Mixture-of-Experts, or both (--mode compare).

Recipes: {", ".join(RECIPES)};
for several tasks on tables {", ".join(TABULAR)} (--recipe NAME --help).

Options come from a preset or a recipe, then a TOML file over it, then flags over both. In the file, options stand in
the sections [model], [moe], [data], [optim], [parallel] and [run]; mode, preset and recipe stand above them. To train
on two processes, with the experts spread over both:

    torchrun --nproc-per-node 2 -m fastmoe train --ep 2 ..."""


@dataclass(frozen=True)
class Command(TrainConfig):
    preset: Literal["small", "demo"] = "small"
    """Options to start from; demo compares the twins in a few minutes on 2 CPU cores."""
    recipe: str | None = None
    """An experiment to start from in place of a preset."""
    config: Path | None = None
    """A TOML file with options."""


def parse(arguments: Sequence[str]) -> TrainConfig:
    """The config that the arguments describe.

    Raises:
        ValueError: an unknown preset or recipe, or a TOML file that cannot be used.
        SystemExit: arguments that cannot be used, or --help.
    """
    sources = argparse.ArgumentParser(prog="fastmoe train", add_help=False, allow_abbrev=False)
    sources.add_argument("--preset")
    sources.add_argument("--recipe")
    sources.add_argument("--config", type=Path)
    given, _ = sources.parse_known_args(arguments)
    values = read_toml(given.config) if given.config else {}
    name = given.preset or values.get("preset", "small")
    named = given.recipe or values.get("recipe")
    for key, value in (("preset", name), ("recipe", named)):
        if not isinstance(value, str | None):
            raise ValueError(f"{key} must be a name; got {value!r}")
    if named in TABULAR:
        raise ValueError(f"recipe {named!r} has options of its own and no file: fastmoe train --recipe {named} --help")
    if named and (given.preset or "preset" in values):
        raise ValueError(f"expected a preset or a recipe; got both, preset {name!r} and recipe {named!r}")
    values = {key: value for key, value in values.items() if key not in ("preset", "recipe")}
    base = merge(recipe(named) if named else preset(name), values, str(given.config))
    default = Command(preset=name, recipe=named, config=given.config, **vars(base))
    command = tyro.cli(
        Command,
        prog="fastmoe train",
        description=DESCRIPTION,
        args=list(arguments),
        default=default,
        config=(tyro.conf.OmitArgPrefixes,),
    )
    config = TrainConfig(**{field.name: getattr(command, field.name) for field in fields(TrainConfig)})
    inherited, options = base.model.model_options, config.model.model_options
    if config.model.arch == base.model.arch:
        options = inherited | options
    else:
        options = {key: value for key, value in options.items() if inherited.get(key) != value}
    return replace(config, model=replace(config.model, model_options=options))


def main(arguments: Sequence[str]) -> int:
    """Run the command; 0: done, or stopped by a signal; 1: training went wrong; 2: it cannot be run as asked."""
    if (handed_over := tabular(arguments)) is not None:
        return handed_over
    with leaving_when_it_fails(), ExitStack() as stack:
        try:
            config = parse(arguments)
            world = stack.enter_context(open_world(config.run.device, config.parallel))
            console = Console(quiet=not world.is_main, highlight=False)
            trainers = set_up(config, world, console)
        except ValueError as error:
            return fail(error, status=2)
        except RunError as error:
            return fail(error, status=1)
        try:
            run(trainers, console)
        except (FloatingPointError, RunError) as error:
            return fail(error, status=1)
    return 0


def tabular(arguments: Sequence[str]) -> int | None:
    """Hand a recipe of fastmoe.tabular over to it, with all other arguments; None if it is none."""
    sources = argparse.ArgumentParser(prog="fastmoe train", add_help=False, allow_abbrev=False)
    sources.add_argument("--recipe")
    given, others = sources.parse_known_args(arguments)
    if given.recipe not in TABULAR:
        return None
    return importlib.import_module("fastmoe.tabular.command").main([given.recipe, *others])


def fail(error: Exception, status: int) -> int:
    cause = error.__cause__ if isinstance(error, RunError) else None
    if isinstance(cause, RuntimeError) and not isinstance(cause, CollectiveError):
        traceback.print_exception(cause)
    print(f"fastmoe train: {error}", file=sys.stderr)
    leave(status)
    return status
