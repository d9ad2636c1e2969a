"""Finished runs of `fastmoe train`: which folders they are, and what `fastmoe compare` reads of their results.json."""

from __future__ import annotations

import glob
import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

WORDS = {dict: "an object", list: "a list", str: "a string", int: "a whole number", float: "a finite number"}
NEEDED = {
    "machine.cpu": str,
    "corpus.name": str,
    "corpus.sha256": str,
    "config.model.arch": str,
    "config.model.block_size": int,
    "config.moe": dict,
    "config.data.eval_sequences": int,
    "config.optim.batch_size": int,
    "config.run.seed": int,
}


@dataclass(frozen=True)
class RunCurve:
    """The validation losses of one trained model, in bits per byte, and where along each axis they were taken."""

    path: str
    kind: str
    """dense or moe."""
    steps: list[float]
    seconds: list[float]
    flops: list[float]
    losses: list[float]
    """NaN where the loss was not finite."""
    details: dict[str, Any]
    """Of results.json: config, corpus, machine, and the model's figures."""

    @property
    def config(self) -> dict[str, Any]:
        return self.details["config"]

    @property
    def seed(self) -> int:
        return self.config["run"]["seed"]


@dataclass(frozen=True)
class Results:
    """A results.json. Asked for what is not in it, it raises a ValueError that names the file."""

    file: Path
    content: Any

    def get(self, path: str, *kinds: type) -> Any:
        """The value at a dotted path, of one of these types; a number is finite."""
        found = self.content
        for key in path.split("."):
            found = found.get(key) if isinstance(found, dict) else None
        if not isinstance(found, kinds) or (isinstance(found, float) and not math.isfinite(found)):
            raise self.error(f"{path} must be {WORDS[kinds[0]]}", found)
        return found

    def numbers(self, path: str, finite: bool = True) -> list[float]:
        found = self.get(path, list)
        if not all(isinstance(value, int | float) and (math.isfinite(value) or not finite) for value in found):
            raise self.error(f"{path} must be {'finite ' if finite else ''}numbers", found)
        return [float(value) for value in found]

    def error(self, expected: str, found: object) -> ValueError:
        got = "nothing" if found is None else f"{found!r:.60}"
        return ValueError(f"{self.file}: {expected}; got {got}")


def find_runs(given: str) -> list[Path]:
    """The folder of this name; where there is none, the folders of a comma-separated list of paths and patterns.

    Raises:
        ValueError: one of them names no folder.
    """
    if os.path.isdir(given):
        return [Path(given)]
    parts = (part.strip() for part in given.split(","))
    return [path for part in parts if part for path in folders(part)]


def folders(pattern: str) -> list[Path]:
    found = [pattern] if os.path.isdir(pattern) else sorted(filter(os.path.isdir, glob.glob(pattern)))
    if not found:
        raise ValueError(f"no such run: {pattern}; give the --out folder of a finished `fastmoe train`")
    return [Path(path) for path in found]


def read_run(path: Path) -> RunCurve:
    """A run of one model, or one model of a run of two: `runs/a/dense`.

    Raises:
        ValueError: it is not finished, cannot be read, or is of two models.
    """
    own, above = path / "results.json", path.parent / "results.json"
    if own.is_file():
        results = read_results(own)
        kinds = list(results.get("histories", dict))
        if len(kinds) == 2:
            raise ValueError(f"{path} has two models: give {path / kinds[0]} or {path / kinds[1]}")
        if len(kinds) != 1:
            raise ValueError(f"{own}: histories must be of one model or of two; it is of {len(kinds)}")
        return curve_of(str(path), results, kinds[0])
    if path.name in ("dense", "moe") and above.is_file():
        results = read_results(above)
        if len(results.get("histories", dict)) == 2:
            return curve_of(str(path), results, path.name)
    raise ValueError(f"{path} is no finished run: there is no {own}")


def read_results(file: Path) -> Results:
    try:
        return Results(file, json.loads(file.read_text(encoding="utf-8")))
    except ValueError as error:
        raise ValueError(f"{file}: it is no JSON: {error}") from error


def curve_of(path: str, results: Results, kind: str) -> RunCurve:
    """Raises ValueError: something is missing, or is not what it should be."""
    for name, needed in NEEDED.items():
        results.get(name, needed)
    details = {name: results.content[name] for name in ("config", "corpus", "machine")}
    details |= {"kind": kind, "figures": results.get(f"results.{kind}", dict)}
    history = f"histories.{kind}"
    steps, seconds = results.numbers(f"{history}.valid_steps"), results.numbers(f"{history}.valid_seconds")
    losses = results.numbers(f"{history}.valid_losses", finite=False)
    if not len(steps) == len(seconds) == len(losses) > 0:
        expected = f"{history} must have as many valid_seconds and valid_losses as valid_steps, and at least one"
        raise ValueError(f"{results.file}: {expected}; got {len(seconds)}, {len(losses)} and {len(steps)}")
    tokens_per_step = results.get("config.optim.batch_size", int) * results.get("config.model.block_size", int)
    per_step = tokens_per_step * results.get(f"results.{kind}.train_flops_per_token", float, int)
    flops = [step * per_step for step in steps]
    return RunCurve(path, kind, steps, seconds, flops, [x if math.isfinite(x) else math.nan for x in losses], details)
