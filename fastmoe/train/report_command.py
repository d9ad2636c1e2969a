"""`fastmoe report`: a run, finished or interrupted, as one HTML file."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastmoe.monitor.sinks.html import Curve, page
from fastmoe.monitor.sinks.jsonl import Records, read_jsonl
from fastmoe.train import checkpoint

KINDS = {"dense": "dense", "moe": "MoE"}


def main(arguments: Sequence[str]) -> int:
    """Write the report; 0: done; 2: there is no run, or it cannot be read."""
    parser = argparse.ArgumentParser(prog="fastmoe report", description="Write a run's report as one HTML file.")
    parser.add_argument("run_dir", type=Path, help="the --out folder of `fastmoe train`")
    parser.add_argument("--out", type=Path, help="the file to write; default: report.html in the run's folder")
    given = parser.parse_args(arguments)
    out: Path = given.out or given.run_dir / "report.html"
    try:
        text = report(given.run_dir)
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(text, encoding="utf-8")
    except (ValueError, OSError) as error:
        print(f"fastmoe report: {error}", file=sys.stderr)
        return 2
    print(f"written: {out}")
    return 0


def report(run_dir: Path) -> str:
    """The HTML page.

    Raises:
        ValueError: the folder has no run, or its files cannot be read.
    """
    if not run_dir.is_dir():
        raise ValueError(f"no such folder: {run_dir}")
    curves: dict[str, Curve] = {}
    for kind, name in KINDS.items():
        history = read_history(run_dir, kind)
        if history is not None:
            curves |= loss_curves(history, name)
    records: Records = read_jsonl(run_dir / "moe" / "load.jsonl")
    if not curves and not records:
        raise ValueError(f"{run_dir} holds no run: no checkpoint, no results.json and no load.jsonl with figures")
    return page(f"Training run {run_dir.resolve().name}", curves, records)


def read_history(run_dir: Path, kind: str) -> dict[str, Any] | None:
    """Of the newest checkpoint; without one, of results.json; None where the run has no such model."""
    found = checkpoint.newest(run_dir / kind, checkpoint.read_extra)
    if found is not None:
        return found["history"]
    results = run_dir / "results.json"
    if not results.is_file():
        return None
    try:
        return json.loads(results.read_text(encoding="utf-8"))["histories"].get(kind)
    except (json.JSONDecodeError, KeyError, AttributeError, TypeError) as error:
        raise ValueError(f"{results} cannot be read: {error!r}") from error


def loss_curves(history: dict[str, Any], name: str) -> dict[str, Curve]:
    """Training loss of each step, faint, and held-out loss; without points, nothing."""
    losses = history["losses"]
    curves = {
        f"{name}, training": Curve(range(1, len(losses) + 1), losses, faint=True),
        f"{name}, held-out": Curve(history["valid_steps"], history["valid_losses"]),
    }
    return {label: curve for label, curve in curves.items() if curve.values}
