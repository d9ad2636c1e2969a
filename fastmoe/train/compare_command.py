"""`fastmoe compare`: two runs, or two sets of seeds, in one picture."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from fastmoe.train.compare import Side, compare, ratio, read_side
from fastmoe.train.compare_plot import plot_sides

DESCRIPTION = """Draw the validation curves of two finished runs by steps, time and training FLOPs, and say when B
reached A's final loss.

A run is the --out folder of `fastmoe train` (of a run of two models: OUT/dense, OUT/moe). Several runs of one model
that differ in their seed alone are one side: a comma-separated list or a quoted pattern, 'runs/txl-seed*', unless there
is a folder of that very name; the curves then are means. All runs must be evaluated on the same bytes. Training FLOPs
per token are 6 * active parameters + 12 * layers * d_model * positions that a query sees on average."""


def main(arguments: Sequence[str]) -> int:
    """Compare; 0: done; 2: a run is not there, or cannot be compared."""
    parser = argparse.ArgumentParser(
        prog="fastmoe compare", description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run_a", metavar="RUN_A", help="the run to measure by")
    parser.add_argument("run_b", metavar="RUN_B", help="the other one")
    parser.add_argument("--out", type=Path, default=Path("runs/compare"), help="folder for the PNG and the JSON")
    parser.add_argument("--names", nargs=2, metavar=("A", "B"), help="what to call them; default: the paths as given")
    given = parser.parse_args(arguments)
    names = given.names or (given.run_a, given.run_b)
    try:
        a, b = read_side(given.run_a, names[0]), read_side(given.run_b, names[1])
        for line in write_comparison(a, b, given.out):
            print(line)
    except (ValueError, OSError) as error:
        print(f"fastmoe compare: {error}", file=sys.stderr)
        return 2
    return 0


def write_comparison(a: Side, b: Side, out: Path) -> list[str]:
    """Write both files; what to tell of them."""
    found = compare(a, b)
    out.mkdir(parents=True, exist_ok=True)
    details = a.runs[0].details
    plot_sides((a, b), out / "compare.png", f"{details['corpus']['name']}; {details['machine']['cpu']}")
    (out / "compare.json").write_text(json.dumps(found, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    return [*told(a, b), f"written: {out / 'compare.png'}, {out / 'compare.json'}"]


def told(a: Side, b: Side) -> list[str]:
    lines = [
        f"{side.name}: {side.losses[-1]:.3f} bits/byte after {side.mean('steps')[-1]:,.0f} steps"
        + (f", standard deviation {side.spread[-1]:.3f} over {len(side.runs)} runs" if len(side.runs) > 1 else "")
        for side in (a, b)
    ]
    target = a.losses[-1]
    steps = b.reaches(target)
    if steps is None:
        return [*lines, f"{b.name} did not reach {a.name}'s final loss"]
    words = (("steps", "steps"), ("seconds", "time"), ("flops", "FLOPs"))
    ratios = [(name, ratio(b.reaches(target, axis), a.mean(axis)[-1])) for axis, name in words]
    shares = ", ".join(f"{share:.0%} of its {name}" for name, share in ratios if share is not None)
    reached = f"{b.name} reached {a.name}'s final loss after {steps:,.0f} steps"
    return [*lines, f"{reached}: {shares}" if shares else reached]
