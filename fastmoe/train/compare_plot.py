"""The picture of `fastmoe compare`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from fastmoe.train.compare import AXES, Side
from fastmoe.train.plots import new_figure

LABELS = {"steps": "steps", "seconds": "seconds of training", "flops": "training FLOPs"}
TITLES = {"steps": "steps", "seconds": "time", "flops": "FLOPs"}
LONGEST = 80


def plot_sides(sides: Sequence[Side], path: Path, caption: str) -> None:
    draw_sides(sides, caption).savefig(path, dpi=120)


def draw_sides(sides: Sequence[Side], caption: str) -> Figure:
    """Validation loss over steps, seconds and FLOPs: means over runs, with their standard deviation as a band.

    A line marks the first side's final loss, which the others are measured by. The first evaluation, of a model that
    has learned nothing, is left out.
    """
    figure = new_figure(13, 4)
    panels = figure.subplots(1, len(AXES), sharey=True)
    for panel, axis in zip(panels, AXES, strict=True):
        for side in sides:
            draw_side(panel, axis, side, label(side) if panel is panels[0] else None)
        panel.axhline(sides[0].losses[-1], color="grey", linewidth=0.8, linestyle="--")
        panel.set(xlabel=LABELS[axis], title=f"at equal {TITLES[axis]}")
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("validation loss, bits per byte")
    for text in figure.legend(loc="outside lower center").get_texts():
        text.set_parse_math(False)
    figure.suptitle(caption, fontsize=9, parse_math=False)
    return figure


def draw_side(panel: Axes, axis: str, side: Side, name: str | None) -> None:
    x, y, spread = side.mean(axis)[1:], side.losses[1:], side.spread[1:]
    panel.plot(x, y, marker=".", label=name)
    low, high = ([v + sign * s for v, s in zip(y, spread, strict=True)] for sign in (-1, 1))
    panel.fill_between(x, low, high, alpha=0.2)


def label(side: Side) -> str:
    """Its name, of a long path the end."""
    name = side.name if len(side.name) <= LONGEST else f"...{side.name[-LONGEST:]}"
    return name if len(side.runs) == 1 else f"{name}, mean of {len(side.runs)} runs"
