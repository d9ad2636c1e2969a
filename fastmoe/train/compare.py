"""Two sides, each one run or one for each seed, beside each other: at equal steps, time and FLOPs."""

from __future__ import annotations

import glob
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from fastmoe.train.history import first_reached

AXES = ("steps", "seconds", "flops")


@dataclass(frozen=True)
class RunCurve:
    """The validation losses of one trained model, in bits per byte, and where along each axis they were taken."""

    path: str
    steps: list[float]
    seconds: list[float]
    flops: list[float]
    losses: list[float]
    details: dict[str, Any]
    """Of results.json: config, corpus, machine, and the model's figures."""

    @property
    def tokens_per_step(self) -> int:
        config = self.details["config"]
        return config["optim"]["batch_size"] * config["model"]["block_size"]


@dataclass(frozen=True)
class Side:
    """One run, or several that differ in their seed; curves are means over them."""

    name: str
    runs: list[RunCurve]

    def mean(self, axis: str) -> list[float]:
        return [fmean(values) for values in zip(*(getattr(run, axis) for run in self.runs), strict=True)]

    @property
    def losses(self) -> list[float]:
        return self.mean("losses")

    @property
    def spread(self) -> list[float]:
        """The standard deviation over runs, 0 for one."""
        columns = zip(*(run.losses for run in self.runs), strict=True)
        return [stdev(values) if len(values) > 1 else 0.0 for values in columns]

    def reaches(self, loss: float, axis: str = "steps") -> float | None:
        """Where along `axis` the mean curve first is at most `loss`, interpolated; None if nowhere."""
        return first_reached(loss, self.mean(axis), self.losses)

    def each_reaches(self, loss: float) -> list[float | None]:
        """The same in steps, of each run alone."""
        return [first_reached(loss, run.steps, run.losses) for run in self.runs]


def find_runs(given: str) -> list[Path]:
    """The folders of a comma-separated list of paths and patterns.

    Raises:
        ValueError: one of them names no folder.
    """
    found: list[Path] = []
    for pattern in filter(None, (part.strip() for part in given.split(","))):
        paths = sorted(Path(path) for path in glob.glob(pattern) if Path(path).is_dir())
        if not paths:
            raise ValueError(f"no such run: {pattern}; give the --out folder of a finished `fastmoe train`")
        found += paths
    return found


def read_run(path: Path) -> RunCurve:
    """A run of one model, or one model of a run of two: `runs/a/dense`.

    Raises:
        ValueError: it is not finished, cannot be read, or is of two models.
    """
    both = path.name in ("dense", "moe") and not (path / "results.json").is_file()
    file = (path.parent if both else path) / "results.json"
    if not file.is_file():
        raise ValueError(f"{path} is no finished run: there is no {file}")
    try:
        written = json.loads(file.read_text(encoding="utf-8"))
        kinds = [path.name] if both else list(written["histories"])
        if len(kinds) != 1:
            raise ValueError(f"{path} has two models: give {path / 'dense'} or {path / 'moe'}")
        return curve_of(str(path), written, kinds[0])
    except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{file} cannot be read: {error!r}") from error


def curve_of(path: str, written: dict[str, Any], kind: str) -> RunCurve:
    history, figures = written["histories"][kind], written["results"][kind]
    details = {name: written[name] for name in ("config", "corpus", "machine")} | {"kind": kind, "figures": figures}
    steps = [float(step) for step in history["valid_steps"]]
    run = RunCurve(path, steps, history["valid_seconds"], [], history["valid_losses"], details)
    per_step = figures["train_flops_per_token"] * run.tokens_per_step
    run.flops.extend(step * per_step for step in steps)
    return run


def read_side(given: str, name: str) -> Side:
    """Raises ValueError: runs of one side were not evaluated at the same steps, or differ in more than the seed."""
    runs = [read_run(path) for path in find_runs(given)]
    if not runs:
        raise ValueError("a side needs at least one run; got none")
    for run in runs[1:]:
        if run.steps != runs[0].steps:
            raise ValueError(f"{run.path} and {runs[0].path} were not evaluated at the same steps")
        for part in ("model", "moe", "optim"):
            if run.details["config"][part] != runs[0].details["config"][part]:
                raise ValueError(f"{run.path} and {runs[0].path} are of one side, and differ in {part}")
    return Side(name, runs)


def compare(a: Side, b: Side) -> dict[str, Any]:
    """What `compare.json` holds.

    Raises:
        ValueError: the sides were not validated on the same bytes.
    """
    corpora = {run.details["corpus"]["sha256"] for run in (*a.runs, *b.runs)}
    if len(corpora) > 1:
        raise ValueError(f"{a.name} and {b.name} learned other data: losses cannot be compared")
    final = a.losses[-1]
    reached = {axis: b.reaches(final, axis) for axis in AXES}
    return {
        "final_loss_of_a": final,
        "b_reaches_it_after": reached,
        "share_of_a": {axis: ratio(reached[axis], a.mean(axis)[-1]) for axis in AXES},
        "b_reaches_it_after_steps_by_run": b.each_reaches(final),
        "sides": {key: as_json(side) for key, side in (("a", a), ("b", b))},
    }


def ratio(part: float | None, whole: float) -> float | None:
    return None if part is None or not whole else part / whole


def as_json(side: Side) -> dict[str, Any]:
    curves: dict[str, Sequence[float]] = {axis: side.mean(axis) for axis in AXES}
    return {
        "name": side.name,
        "runs": [run.path for run in side.runs],
        **curves,
        "losses": side.losses,
        "spread": side.spread,
        "details": side.runs[0].details,
    }
