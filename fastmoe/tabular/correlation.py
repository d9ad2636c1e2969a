"""The experiment on the correlation of two tasks, from problems to JSON and a figure."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from fastmoe.tabular.grid import Show, check_distinct, check_folder, check_grid, write
from fastmoe.tabular.plots import LABELS, plot_curves
from fastmoe.tabular.synthetic import Curve, Problem, SyntheticOptions, fit_synthetic, make_problem


def run_synthetic(
    correlations: Sequence[float] = (0.5, 0.9, 1.0),
    seeds: Sequence[int] = range(5),
    out: Path = Path("runs/mmoe-synthetic"),
    *,
    models: Sequence[str] = ("mmoe", "omoe", "shared_bottom"),
    lrs: Sequence[float] = (1e-3, 1e-2),
    options: SyntheticOptions | None = None,
    show: Show = print,
) -> dict[str, Any]:
    """The paper's experiment on task correlation (data of section 3.2, models of section 5.1).

    Each model is trained once for each of `seeds` with each of `lrs`, and reported for each correlation at the learning
    rate with the lowest mean loss at the end. No row is seen twice, so that there is nothing to overfit.

    Writes `synthetic.json` and `synthetic.png` into `out`, and returns what is in the JSON.

    Raises:
        ValueError: correlations, models, seeds, learning rates or options that cannot be used, or training that
            diverges.
    """
    options = options or SyntheticOptions()
    check_grid(models, seeds, lrs)
    check_distinct("correlations", correlations)
    problems = {f"{c:g}": [make_problem(c, seed, options) for seed in seeds] for c in correlations}
    check_folder(out)
    losses: dict[str, dict[str, dict[str, Any]]] = {c: {} for c in problems}
    steps, parameters = [], {}
    for correlation, of_seeds in problems.items():
        for model in models:
            curves = {lr: fit_seeds(of_seeds, model, seeds, lr, options) for lr in lrs}
            best = min(lrs, key=lambda lr: last_loss(curves[lr]))
            losses[correlation][model] = {
                "lr": best,
                "losses": [curve.losses for curve in curves[best]],
                "lrs": {f"{lr:g}": last_loss(curves[lr]) for lr in lrs},
            }
            steps, parameters[model] = curves[best][0].steps, curves[best][0].parameters
            show(
                f"correlation {correlation}, {LABELS[model]}, lr {best:g}: held-out loss {last_loss(curves[best]):.4f}"
            )
    result = {
        "recipe": "mmoe-synthetic",
        "options": asdict(options) | {"lrs": list(lrs)},
        "seeds": list(seeds),
        "parameters": parameters,
        "steps": steps,
        "correlations": losses,
    }
    write(result, out / "synthetic.json")
    by_seed = {c: {model: row["losses"] for model, row in rows.items()} for c, rows in losses.items()}
    plot_curves(by_seed, steps, out / "synthetic.png")
    return result


def fit_seeds(
    problems: Sequence[Problem], model: str, seeds: Sequence[int], lr: float, options: SyntheticOptions
) -> list[Curve]:
    return [fit_synthetic(problem, model, seed, lr, options) for problem, seed in zip(problems, seeds, strict=True)]


def last_loss(curves: Sequence[Curve]) -> float:
    """Mean over seeds."""
    return statistics.fmean(curve.losses[-1] for curve in curves)
