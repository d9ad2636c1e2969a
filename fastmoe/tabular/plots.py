"""The figures of the experiments on tables."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

LABELS = {"mmoe": "MMoE", "omoe": "OMoE", "shared_bottom": "shared bottom", "single_task": "single task"}


def new_figure(width: float, height: float) -> Figure:
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def plot_gates(gates_SKE: Mapping[str, Sequence[Sequence[float]]], tasks: Sequence[str], path: Path) -> None:
    """A heat map for each seed, or whatever the keys name, five side by side: tasks downwards, experts to the right,
    mean gate weights."""
    columns, lines = min(5, len(gates_SKE)), math.ceil(len(gates_SKE) / 5)
    figure = new_figure(2.3 * columns + 2.2, lines * (0.5 * len(tasks) + 1.3))
    panels = figure.subplots(lines, columns, squeeze=False, sharey=True)
    highest = max(max(max(row) for row in gate_KE) for gate_KE in gates_SKE.values())
    for panel in panels.flat[len(gates_SKE) :]:
        panel.set_axis_off()
    for panel, (title, gate_KE) in zip(panels.flat, gates_SKE.items(), strict=False):
        image = panel.imshow(gate_KE, vmin=0, vmax=highest, cmap="Blues", aspect="auto")
        panel.set_title(title, fontsize=9)
        panel.set_xticks(range(len(gate_KE[0])))
        panel.set_yticks(range(len(tasks)), tasks)
    figure.supxlabel("expert", fontsize=9)
    figure.colorbar(image, ax=panels, label="mean gate weight")
    save(figure, path)


def plot_aucs(aucs: Mapping[str, Sequence[Sequence[float]]], tasks: Sequence[str], path: Path) -> None:
    """A panel for each task: every seed's AUC of every model as a point, mean and standard deviation beside them."""
    figure = new_figure(4 * len(tasks), 3.4)
    panels = figure.subplots(1, len(tasks), squeeze=False)[0]
    for task, panel in enumerate(panels):
        for place, by_seed in enumerate(aucs.values()):
            values = [auc_K[task] for auc_K in by_seed]
            panel.plot([place] * len(values), values, "o", alpha=0.5, color=f"C{place}")
            spread = statistics.stdev(values) if len(values) > 1 else 0.0
            panel.errorbar([place + 0.2], [statistics.fmean(values)], [spread], fmt="_k", capsize=4)
            panel.set_title(tasks[task], fontsize=9)
        panel.set_xticks(range(len(aucs)), [LABELS[model] for model in aucs])
        panel.set_xlim(-0.5, len(aucs) - 0.3)
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("test AUC")
    save(figure, path)


def plot_curves(
    curves: Mapping[str, Mapping[str, Sequence[Sequence[float]]]], steps: Sequence[int], path: Path
) -> None:
    """Two panels for each correlation: held-out loss over steps, a line for each model, its mean over seeds; and below,
    each seed's loss after the last step as a point."""
    figure = new_figure(3.8 * len(curves), 6.0)
    panels = figure.subplots(2, len(curves), squeeze=False, sharey=True, height_ratios=(3, 2))
    for (upper, lower), (correlation, models) in zip(panels.T, curves.items(), strict=True):
        for place, (model, by_seed) in enumerate(models.items()):
            means = [statistics.fmean(at_step) for at_step in zip(*by_seed, strict=True)]
            upper.plot(steps[1:], means[1:], label=LABELS[model])
            lower.plot([place] * len(by_seed), [losses[-1] for losses in by_seed], "o", alpha=0.4, color=f"C{place}")
        upper.set_yscale("log")
        upper.set_title(f"correlation {correlation}", fontsize=10)
        upper.set_xlabel("steps")
        lower.set_xticks(range(len(models)), [LABELS[model] for model in models])
        lower.set_xlim(-0.5, len(models) - 0.5)
        for panel in (upper, lower):
            panel.grid(alpha=0.3, which="both")
    panels[0, 0].set_ylabel("held-out mean squared error")
    panels[1, 0].set_ylabel("of every seed, at the end")
    panels[0, -1].legend()
    save(figure, path)


def save(figure: Figure, path: Path) -> None:
    figure.savefig(path, dpi=110)
