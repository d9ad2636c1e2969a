"""One training run, from set-up to report."""

from __future__ import annotations

import json
from contextlib import ExitStack

from rich.console import Console
from rich.text import Text

import fastmoe
from fastmoe.train import checkpoint
from fastmoe.train.config import NAMES, Kind, RunConfig, TrainConfig
from fastmoe.train.corpus import load_corpus
from fastmoe.train.display import ProgressDisplay, TensorBoard
from fastmoe.train.failure import during
from fastmoe.train.load import LoadObserver
from fastmoe.train.loop import Observer, StopSignals, train
from fastmoe.train.report import outcomes, table, write_artefacts
from fastmoe.train.sample import sample_text
from fastmoe.train.trainer import Trainer
from fastmoe.train.world import World


def set_up(config: TrainConfig, world: World, console: Console) -> list[Trainer]:
    """A trainer for each model, at the step where its newest checkpoint left it if the run is resumed.

    Raises:
        ValueError: the config does not fit its data, its checkpoints or the number of processes.
        RunError: another process died.
    """
    with during("set-up"):
        return _set_up(config, world, console)


def _set_up(config: TrainConfig, world: World, console: Console) -> list[Trainer]:
    corpus = world.together.each(lambda: load_corpus(config.data.path, config.data.valid))
    console.print(str(corpus))
    kinds: tuple[Kind, ...] = ("dense", "moe") if config.mode == "compare" else (config.mode,)
    world.together.each(lambda: check_folder(config.run, kinds))
    trainers = [Trainer(config, kind, corpus, world) for kind in kinds]
    if any(not layer.router.causal for trainer in trainers for layer in fastmoe.moe_layers(trainer.model).values()):
        console.print(
            f"warning: what router {config.moe.router!r} gives a token depends, with these options, on later ones too: "
            "the model sees the future, and its loss is not quite that of a language model"
        )
    for trainer in trainers:
        if config.run.resume:
            resume(trainer, console)
        else:
            start_anew(trainer)
    return trainers


def check_folder(run: RunConfig, kinds: tuple[Kind, ...]) -> None:
    """Raises ValueError: `out` is no folder, or has the results of a run of other models."""
    if run.out.exists() and not run.out.is_dir():
        raise ValueError(f"out must be a folder; {run.out} is a file")
    results = run.out / "results.json"
    try:
        earlier = tuple(json.loads(results.read_text(encoding="utf-8"))["histories"])
    except (OSError, ValueError, KeyError, TypeError):  # there are none, or a killed run's
        return
    if set(earlier) - set(kinds) and not run.overwrite:
        raise ValueError(
            f"{results} is of a run of {' and '.join(earlier)}, this one is of {' and '.join(kinds)}: "
            "give another --out, or --overwrite"
        )


def run(trainers: list[Trainer], console: Console) -> None:
    """Train, and report unless a signal stopped it.

    Raises:
        RunError, FloatingPointError: see `train`.
    """
    finished = train_watched(trainers, console)
    with during("report"):
        if finished:
            report(trainers, console)
        trainers[0].world.barrier()


def resume(trainer: Trainer, console: Console) -> None:
    found = checkpoint.newest(trainer.folder, trainer.restore, trainer.world.together)
    if found is None:
        console.print(f"{NAMES[trainer.kind]}: no checkpoint in {trainer.folder}, starting anew")
    else:
        console.print(f"{NAMES[trainer.kind]}: resumed from {found}")


def start_anew(trainer: Trainer) -> None:
    earlier = trainer.world.together.all(checkpoint.checkpoints(trainer.folder))[0]
    if earlier and not trainer.config.run.overwrite:
        raise ValueError(f"{earlier[0]} is of an earlier run: give --resume, --overwrite or another --out")
    if trainer.world.is_main:
        checkpoint.prune(trainer.folder, keep=0)


def train_watched(trainers: list[Trainer], console: Console) -> bool:
    """Train to the end and return True, or until a signal comes and return False."""
    config, world = trainers[0].config, trainers[0].world
    with ExitStack() as stack:
        stop = stack.enter_context(StopSignals())
        observers: list[Observer] = []
        if config.run.monitor:
            observers.append(stack.enter_context(LoadObserver(trainers, console)))
        if world.is_main:
            observers.append(stack.enter_context(ProgressDisplay(console, trainers)))
            if config.run.tensorboard:
                observers.append(stack.enter_context(TensorBoard(trainers)))
        finished = train(trainers, observers, stop)
    if not finished:
        steps = ", ".join(f"{NAMES[trainer.kind]} at step {trainer.step}" for trainer in trainers)
        console.print(f"stopped by a signal; saved {steps} in {config.run.out}. Continue with --resume")
    return finished


def report(trainers: list[Trainer], console: Console) -> None:
    results = outcomes(trainers)
    text = sample_text(trainers[-1], trainers[0].config.run.sample_bytes)
    if not trainers[0].world.is_main:
        return
    paths = write_artefacts(trainers, results, text)
    console.print(table(results))
    console.print(f"text sampled from the {NAMES[trainers[-1].kind]} model:")
    console.print(Text(text), style="dim")
    saved = [checkpoint.checkpoints(trainer.folder)[0] for trainer in trainers]
    console.print("written: " + ", ".join(str(path) for path in [*saved, *paths]))
