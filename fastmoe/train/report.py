"""The outcome of a run: a table, a JSON file, figures, and text sampled from the model."""

from __future__ import annotations

import json
import os
import platform
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

import fastmoe
from fastmoe.train.config import NAMES, Kind
from fastmoe.train.display import tokens_per_second
from fastmoe.train.history import History, busiest, loss_at, steps_to_reach
from fastmoe.train.models import train_flops_per_token
from fastmoe.train.options import to_plain
from fastmoe.train.plots import plot_curves, plot_expert_load
from fastmoe.train.trainer import Trainer


@dataclass(frozen=True)
class Outcome:
    """Figures of one trained model; losses in bits per byte. `None`: not reached, or nothing to compare with."""

    steps: int
    valid_loss: float
    valid_loss_at_equal_time: float | None
    steps_to_dense_loss: float | None
    test_loss: float | None
    seconds: float
    tokens_per_second: float
    busiest_expert: float | None
    total_params: int
    active_params: int
    train_flops_per_token: float


def outcomes(trainers: list[Trainer]) -> dict[Kind, Outcome]:
    """Each trainer's figures; all processes call it, since they share the evaluation on test data."""
    histories = {trainer.kind: trainer.history for trainer in trainers}
    equal_seconds = min(history.seconds for history in histories.values())
    found: dict[Kind, Outcome] = {}
    for trainer in trainers:
        history, size = trainer.history, fastmoe.summary(trainer.model)
        compared = len(trainers) > 1
        found[trainer.kind] = Outcome(
            steps=trainer.step,
            valid_loss=history.valid_losses[-1],
            valid_loss_at_equal_time=loss_at(equal_seconds, history) if compared else None,
            steps_to_dense_loss=steps_to_reach(histories["dense"].valid_losses[-1], history) if compared else None,
            test_loss=trainer.loss_on(trainer.corpus.test) if trainer.corpus.test.numel() else None,
            seconds=history.seconds,
            tokens_per_second=tokens_per_second(trainer),
            busiest_expert=busiest(history.loads[-1]) if history.loads[-1] else None,
            total_params=size.total_params,
            active_params=size.active_params,
            train_flops_per_token=train_flops_per_token(trainer.model, trainer.config.model),
        )
    return found


def table(results: dict[Kind, Outcome]) -> Table:
    """One column per model; losses in bits per byte."""
    columns = list(results.values())
    equal_seconds = min(outcome.seconds for outcome in columns)
    rows = [(f"held-out loss after {columns[0].steps} steps", [f"{o.valid_loss:.3f}" for o in columns])]
    if len(columns) > 1:
        at_equal_time = [f"{o.valid_loss_at_equal_time:.3f}" for o in columns]
        rows += [
            (f"held-out loss after {equal_seconds:.0f} s of training", at_equal_time),
            ("steps to the dense model's final loss", [count(o.steps_to_dense_loss) for o in columns]),
        ]
    rows += [
        ("test loss", ["-" if o.test_loss is None else f"{o.test_loss:.3f}" for o in columns]),
        ("training time", [f"{o.seconds:.0f} s" for o in columns]),
        ("tokens/s", [f"{o.tokens_per_second:,.0f}" for o in columns]),
        ("total parameters", [f"{o.total_params:,}" for o in columns]),
        ("active parameters per token", [f"{o.active_params:,}" for o in columns]),
        ("busiest expert / mean", ["-" if o.busiest_expert is None else f"{o.busiest_expert:.2f}" for o in columns]),
    ]
    made = Table(title="losses in bits per byte", title_justify="left")
    made.add_column("")
    for kind in results:
        made.add_column(NAMES[kind], justify="right")
    for label, cells in rows:
        made.add_row(label, *cells)
    return made


def count(steps: float | None) -> str:
    return "not reached" if steps is None else f"{steps:,.0f}"


def write_artefacts(trainers: list[Trainer], results: dict[Kind, Outcome], text: str) -> list[Path]:
    """`results.json`, `curves.png`, `expert_load.png` (where there are experts) and `sample.txt`; their paths."""
    out = trainers[0].config.run.out
    histories: dict[Kind, History] = {trainer.kind: trainer.history for trainer in trainers}
    caption = f"{trainers[0].corpus.name}; {machine()['cpu']}, {machine()['cores']} cores"
    plot_curves(histories, out / "curves.png", caption)
    written = [out / "curves.png"]
    if "moe" in histories and histories["moe"].loads[-1]:
        plot_expert_load(histories["moe"], out / "expert_load.png")
        written.append(out / "expert_load.png")
    (out / "sample.txt").write_text(text, encoding="utf-8")
    (out / "results.json").write_text(json.dumps(as_json(trainers, results), indent=1) + "\n", encoding="utf-8")
    return [*written, out / "sample.txt", out / "results.json"]


def as_json(trainers: list[Trainer], results: dict[Kind, Outcome]) -> dict[str, Any]:
    corpus = trainers[0].corpus
    return {
        "machine": machine(),
        "processes": trainers[0].world.size,
        "corpus": {"name": corpus.name, "train_bytes": corpus.train.numel(), "sha256": corpus.sha256},
        "config": to_plain(trainers[0].config),
        "results": {kind: asdict(outcome) for kind, outcome in results.items()},
        "histories": {trainer.kind: trainer.history.to_plain() for trainer in trainers},
    }


def machine() -> dict[str, Any]:
    return {
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "threads": torch.get_num_threads(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "fastmoe": fastmoe.__version__,
    }


def cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
