"""A picture: each layer's load over time as a heat map."""

import math
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from fastmoe.monitor.sinks import over_time
from fastmoe.monitor.sinks.jsonl import Records
from fastmoe.monitor.snapshot import LoadSnapshot

PANELS_PER_ROW = 4


class HeatMapPng:
    """Gathers snapshots; `close` draws them."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.records: Records = []

    def write(self, step: int, snapshot: LoadSnapshot) -> None:
        self.records.append((step, snapshot))

    def close(self) -> None:
        if self.records:
            draw(self.records, self.path)


def draw(records: Records, path: Path) -> None:
    """One panel per layer, experts upwards, steps to the right; white is the mean load."""
    layers = list(records[-1][1])
    columns = min(PANELS_PER_ROW, len(layers))
    rows = math.ceil(len(layers) / columns)
    figure = Figure(figsize=(3.2 * columns + 1.2, 2.6 * rows + 0.6), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(rows, columns, squeeze=False, sharex=True)
    for panel, layer in zip(panels.flat, layers, strict=False):
        steps, shares = over_time(records, layer)
        width = steps[-1] - steps[-2] if len(steps) > 1 else 1
        extent = (steps[0] - width / 2, steps[-1] + width / 2, -0.5, len(shares) - 0.5)
        image = panel.imshow(
            shares, aspect="auto", origin="lower", vmin=0, vmax=2, cmap="RdBu_r", interpolation="nearest", extent=extent
        )
        panel.set_title(layer or "model", fontsize=9)
        panel.yaxis.get_major_locator().set_params(integer=True)
    for panel in panels.flat[len(layers) :]:
        panel.set_visible(False)
    figure.supxlabel("steps", fontsize=9)
    figure.supylabel("expert", fontsize=9)
    figure.colorbar(image, ax=panels, label="load / mean load", extend="max")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
