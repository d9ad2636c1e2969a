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
    """One panel per layer, experts upwards, steps to the right, each load as wide as its window; white is the mean."""
    layers = list(records[-1][1])
    columns = min(PANELS_PER_ROW, len(layers))
    rows = math.ceil(len(layers) / columns)
    figure = Figure(figsize=(3.2 * columns + 1.2, 2.6 * rows + 0.6), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(rows, columns, squeeze=False, sharex=True)
    for panel, layer in zip(panels.flat, layers, strict=False):
        steps, shares = over_time(records, layer)
        first = 2 * steps[0] - steps[1] if len(steps) > 1 else steps[0] - 1
        borders = [expert - 0.5 for expert in range(len(shares) + 1)]
        image = panel.pcolormesh([first, *steps], borders, shares, vmin=0, vmax=2, cmap="RdBu_r", rasterized=True)
        panel.set_title(layer or "model", fontsize=9)
        panel.yaxis.get_major_locator().set_params(integer=True)
    for panel in panels.flat[len(layers) :]:
        panel.set_visible(False)
    figure.supxlabel("steps", fontsize=9)
    figure.supylabel("expert", fontsize=9)
    figure.colorbar(image, ax=panels, label="load / mean load", extend="max")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
