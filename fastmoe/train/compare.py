"""Two sides, each one run or one for each seed, beside each other: at equal steps, time and FLOPs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from fastmoe.train.compare_runs import RunCurve, find_runs, read_run
from fastmoe.train.config import ModelConfig
from fastmoe.train.history import first_reached

AXES = ("steps", "seconds", "flops")


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
        """The standard deviation over runs: 0 for one, NaN where one of their losses is."""
        columns = zip(*(run.losses for run in self.runs), strict=True)
        return [math.nan if any(map(math.isnan, column)) else deviation(column) for column in columns]

    def reaches(self, loss: float, axis: str = "steps") -> float | None:
        """Where along `axis` the mean curve first is at most `loss`, interpolated; None if nowhere."""
        return where_reached(loss, self.mean(axis), self.losses)

    def each_reaches(self, loss: float) -> list[float | None]:
        """The same in steps, of each run alone."""
        return [where_reached(loss, run.steps, run.losses) for run in self.runs]


def deviation(values: Sequence[float]) -> float:
    return stdev(values) if len(values) > 1 else 0.0


def where_reached(loss: float, xs: Sequence[float], losses: Sequence[float]) -> float | None:
    """As `first_reached`, over the evaluations whose loss is a number."""
    points = [(x, y) for x, y in zip(xs, losses, strict=True) if not math.isnan(y)]
    return first_reached(loss, [x for x, _ in points], [y for _, y in points])


def read_side(given: str, name: str) -> Side:
    """The runs that a path, or a comma-separated list of paths and patterns, names."""
    return side_of(find_runs(given), name)


def side_of(paths: Sequence[Path], name: str) -> Side:
    """Raises ValueError: there is no run, one is there twice, or they differ in more than the seed."""
    if not paths:
        raise ValueError("a side needs at least one run; got none")
    for i, path in enumerate(paths):
        if path.resolve() in [earlier.resolve() for earlier in paths[:i]]:
            raise ValueError(f"{path} is given twice")
    runs = [read_run(path) for path in paths]
    for i, run in enumerate(runs):
        for earlier in runs[:i]:
            check_same_side(run, earlier)
    return Side(name, runs)


def check_same_side(run: RunCurve, other: RunCurve) -> None:
    both = f"{run.path} and {other.path} are of one side"
    if run.kind != other.kind:
        raise ValueError(f"{both}: expected one kind of model; got {run.kind} and {other.kind}")
    for section in ("model", "moe", "optim"):
        if run.config[section] != other.config[section]:
            raise ValueError(f"{both}, and differ in {section}")
    if run.seed == other.seed:
        raise ValueError(f"{both}, and both have seed {run.seed}")
    check_same_evaluation(run, other)
    if run.steps != other.steps:
        raise ValueError(f"{run.path} and {other.path} were not evaluated at the same steps")


def check_same_evaluation(run: RunCurve, other: RunCurve) -> None:
    """Raises ValueError: their losses are not of the same bytes."""
    if run.details["corpus"]["sha256"] != other.details["corpus"]["sha256"]:
        raise ValueError(f"{run.path} and {other.path} learned other data: their losses cannot be compared")
    for section, name in (("data", "eval_sequences"), ("model", "block_size")):
        here, there = run.config[section][name], other.config[section][name]
        if here != there:
            raise ValueError(
                f"{run.path} was evaluated with {name} = {here}, {other.path} with {there}: "
                "their losses cannot be compared"
            )
    if has_memory(run) != has_memory(other) and run.config["data"]["eval_sequences"]:
        raise ValueError(
            f"{run.path} and {other.path} were evaluated on other bytes, since one model has memory and one has none: "
            "train both with --eval-sequences 0, which leaves out less than block_size of them"
        )


def has_memory(run: RunCurve) -> bool:
    return ModelConfig(arch=run.config["model"]["arch"]).has_memory


def compare(a: Side, b: Side) -> dict[str, Any]:
    """What `compare.json` holds.

    Raises:
        ValueError: the sides were not validated on the same bytes, or A's final loss is not finite.
    """
    check_same_evaluation(b.runs[0], a.runs[0])
    final = a.losses[-1]
    if math.isnan(final):
        diverged = ", ".join(run.path for run in a.runs if math.isnan(run.losses[-1]))
        raise ValueError(f"{diverged} ended with a loss that is not finite: there is nothing to reach")
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
    """Its curves and those of each run; null where a number is not finite, for which JSON has no word."""
    curves = {axis: side.mean(axis) for axis in AXES}
    runs = [{name: getattr(run, name) for name in ("path", "seed", "steps", "seconds", "losses")} for run in side.runs]
    written = {"name": side.name, "runs": runs, **curves, "losses": side.losses, "spread": side.spread}
    return finite(written | {"details": side.runs[0].details})


def finite(value: Any) -> Any:
    """`value` with None in place of each number in it that is not finite."""
    if isinstance(value, dict):
        return {key: finite(each) for key, each in value.items()}
    if isinstance(value, list):
        return [finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
