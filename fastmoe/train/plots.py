"""The figures of a run: validation curves, and expert load over time."""

from __future__ import annotations

from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from fastmoe.train.config import NAMES, Kind
from fastmoe.train.history import History


def new_figure(width: float, height: float) -> Figure:
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def plot_curves(histories: dict[Kind, History], path: Path, caption: str) -> None:
    """Validation loss over steps and over seconds of training."""
    figure = new_figure(10, 4)
    by_step, by_time = figure.subplots(1, 2, sharey=True)
    for kind, history in histories.items():
        by_step.plot(history.valid_steps, history.valid_losses, marker=".", label=NAMES[kind])
        by_time.plot(history.valid_seconds, history.valid_losses, marker=".", label=NAMES[kind])
    by_step.set(xlabel="steps", ylabel="validation loss, bits per byte", title="at equal steps")
    by_time.set(xlabel="seconds of training", title="at equal wall time")
    worst = max(history.valid_losses[1:2] or history.valid_losses for history in histories.values())[0]
    best = min(min(history.valid_losses) for history in histories.values())
    by_step.set_ylim(best - 0.1, worst + 0.1)
    for axes in (by_step, by_time):
        axes.grid(alpha=0.3)
        axes.legend()
    figure.suptitle(caption, fontsize=9)
    figure.savefig(path, dpi=120)


def plot_expert_load(history: History, path: Path) -> None:
    """One heat map per layer: the share of rows that each expert got, at each evaluation."""
    points = [(step, load) for step, load in zip(history.valid_steps, history.loads, strict=True) if load]
    steps, last = [step for step, _ in points], points[-1][1]
    figure = new_figure(2.5 * len(last) + 1, 3)
    panels = figure.subplots(1, len(last), squeeze=False)[0]
    for i, panel in enumerate(panels):
        num_experts = len(last[i])
        shares = [[load[i][expert] * num_experts for _, load in points] for expert in range(num_experts)]
        extent = (0, steps[-1], -0.5, num_experts - 0.5)
        image = panel.imshow(shares, aspect="auto", origin="lower", vmin=0, vmax=2, extent=extent)
        panel.set(title=f"MoE layer {i}", xlabel="steps")
    panels[0].set_ylabel("expert")
    figure.colorbar(image, ax=panels, label="load / mean load")
    figure.savefig(path, dpi=120)
