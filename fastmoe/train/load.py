"""The experts' load over a run: `--monitor`."""

from __future__ import annotations

from rich.console import Console

import fastmoe
from fastmoe.monitor.sinks import Sink
from fastmoe.monitor.sinks.jsonl import JsonLines, read_jsonl
from fastmoe.monitor.sinks.png import draw
from fastmoe.monitor.sinks.tensorboard import TensorBoardLoad
from fastmoe.monitor.sinks.terminal import load_table
from fastmoe.train.loop import Observer
from fastmoe.train.trainer import Trainer

FILE = "load.jsonl"


class LoadObserver(Observer):
    """A snapshot of each MoE trainer at every log step: all processes take it, the first one writes it."""

    def __init__(self, trainers: list[Trainer], console: Console) -> None:
        self.console = console
        self.trainers = [trainer for trainer in trainers if fastmoe.moe_layers(trainer.model)]
        self.monitors = {
            trainer.kind: fastmoe.LoadMonitor(trainer.model, group=trainer.world.group) for trainer in self.trainers
        }
        self.sinks: dict[str, list[Sink]] = {trainer.kind: open_sinks(trainer) for trainer in self.trainers}

    def __enter__(self) -> LoadObserver:
        return self

    def __exit__(self, *error: object) -> None:
        for trainer in self.trainers:
            self.monitors[trainer.kind].close()
            for sink in self.sinks[trainer.kind]:
                sink.close()
            if trainer.world.is_main:
                show(trainer, self.console)

    def logged(self, trainer: Trainer) -> None:
        if trainer.kind in self.monitors:
            snapshot = self.monitors[trainer.kind].snapshot()
            for sink in self.sinks[trainer.kind]:
                sink.write(trainer.step, snapshot)


def open_sinks(trainer: Trainer) -> list[Sink]:
    """Those of this process; what an earlier run wrote after the step that it is resumed from is left out."""
    if not trainer.world.is_main:
        return []
    sinks: list[Sink] = [JsonLines(trainer.folder / FILE, truncate_after=trainer.step)]
    if trainer.config.run.tensorboard:
        sinks.append(TensorBoardLoad(trainer.folder / "tensorboard" / "load", purge_step=trainer.step + 1))
    return sinks


def show(trainer: Trainer, console: Console) -> None:
    """The table of the last snapshot, and `load.png` of all, a resumed run's earlier ones included."""
    records = read_jsonl(trainer.folder / FILE)
    if records:
        step, snapshot = records[-1]
        console.print(load_table(snapshot, title=f"expert load up to step {step}"))
        draw(records, trainer.folder / "load.png")
