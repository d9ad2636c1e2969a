"""A report in one HTML file that needs no network: the drawing library is inside."""

import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import plotly.graph_objects as go
from plotly.offline import get_plotlyjs
from plotly.subplots import make_subplots

from fastmoe.monitor.sinks import over_time
from fastmoe.monitor.sinks.jsonl import Records
from fastmoe.monitor.snapshot import LayerLoad, LoadSnapshot

LINES = {
    "cv": "coefficient of variation of the load",
    "drop_rate": "share of choices dropped",
    "entropy": "entropy of the load, nats",
}
STYLE = """body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 1100px; color: #222 }
h1 { font-size: 1.5rem } h2 { font-size: 1.15rem; margin: 2rem 0 0.5rem }
table { border-collapse: collapse } td, th { padding: 0.25rem 0.8rem; border-bottom: 1px solid #ddd;
  text-align: right }
td:first-child, th:first-child { text-align: left }"""


@dataclass(frozen=True)
class Curve:
    """A loss over steps; a faint one is drawn thin, behind the others."""

    steps: Sequence[int]
    values: Sequence[float]
    faint: bool = False


@dataclass
class HtmlReport:
    """Gathers snapshots; `close` writes the report. `curves` are losses by name, and may be added until then."""

    path: Path
    title: str = "Expert load"
    curves: dict[str, Curve] = field(default_factory=dict)
    records: Records = field(default_factory=list)

    def write(self, step: int, snapshot: LoadSnapshot) -> None:
        self.records.append((step, snapshot))

    def close(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text(page(self.title, self.curves, self.records), encoding="utf-8")


def page(title: str, curves: Mapping[str, Curve], records: Records) -> str:
    """The whole report as HTML; parts without data are left out."""
    parts: list[tuple[str, str]] = []
    if curves:
        parts.append(("Loss", _embed(loss_figure(curves))))
    if records:
        parts.append((f"Load at step {records[-1][0]:,}", summary_table(records[-1][1])))
        parts.append(("Load of each expert over time", _embed(heat_figure(records))))
        parts.append(("Balance over time", _embed(line_figure(records))))
    body = "\n".join(f"<h2>{heading}</h2>\n{content}" for heading, content in parts)
    title = html.escape(title)
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>\n'
        f"<style>{STYLE}</style>\n<script>{get_plotlyjs()}</script></head>\n"
        f"<body><h1>{title}</h1>\n{body}\n</body></html>\n"
    )


def _embed(figure: go.Figure) -> str:
    figure.update_layout(template="plotly_white", font_size=13)
    options = {"displaylogo": False, "responsive": True}
    return figure.to_html(full_html=False, include_plotlyjs=False, config=options)


def loss_figure(curves: Mapping[str, Curve]) -> go.Figure:
    figure = go.Figure()
    for name, curve in curves.items():
        look = {"opacity": 0.4, "line_width": 1} if curve.faint else {"line_width": 2.5}
        figure.add_scatter(x=list(curve.steps), y=list(curve.values), name=name, mode="lines", **look)
    return figure.update_layout(height=380, margin_t=20, xaxis_title="steps", yaxis_title="bits per byte")


def heat_figure(records: Records) -> go.Figure:
    """A panel per layer; white is the mean load."""
    layers = list(records[-1][1])
    columns = min(2, len(layers))
    rows = -(-len(layers) // columns)
    figure = make_subplots(rows, columns, subplot_titles=[name or "model" for name in layers], shared_xaxes=True)
    for i, layer in enumerate(layers):
        steps, shares = over_time(records, layer)
        hover = "step %{x}, expert %{y}: %{z:.2f} x the mean<extra></extra>"
        heat = go.Heatmap(x=steps, y=list(range(len(shares))), z=shares, coloraxis="coloraxis", hovertemplate=hover)
        figure.add_trace(heat, row=i // columns + 1, col=i % columns + 1)
    colors = {"colorscale": "RdBu_r", "cmin": 0, "cmax": 2, "colorbar_title": "load /<br>mean load"}
    figure.update_layout(height=max(300, 230 * rows), margin_t=40, coloraxis=colors)
    figure.update_xaxes(title_text="steps", row=rows)
    return figure.update_yaxes(title_text="expert", col=1)


def line_figure(records: Records) -> go.Figure:
    """A panel per figure, a line per layer."""
    figure = make_subplots(1, len(LINES), subplot_titles=list(LINES.values()))
    colors = ("#1f77b4", "#ff7f0e", "#2ca02c", "#d62728", "#9467bd", "#8c564b", "#e377c2", "#7f7f7f")
    steps = [step for step, _ in records]
    for i, layer in enumerate(records[-1][1]):
        for column, figure_name in enumerate(LINES, 1):
            values = [getattr(snapshot[layer], figure_name) for _, snapshot in records]
            line = go.Scatter(
                x=steps,
                y=values,
                name=layer or "model",
                legendgroup=layer,
                showlegend=column == 1,
                line_color=colors[i % len(colors)],
            )
            figure.add_trace(line, row=1, col=column)
    figure.update_annotations(font_size=13)
    figure.update_yaxes(rangemode="tozero")
    figure.update_xaxes(title_text="steps")
    return figure.update_layout(height=360, margin_t=40, legend={"orientation": "h", "y": -0.25})


def summary_table(snapshot: LoadSnapshot) -> str:
    heads = ("layer", "experts", "rows", "busiest / mean", "cv", "dead", "dropped", "router entropy", "balance losses")
    rows = [_cells(name, load) for name, load in snapshot.items()]
    head = "".join(f"<th>{name}</th>" for name in heads)
    body = "\n".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table><thead><tr>{head}</tr></thead><tbody>\n{body}\n</tbody></table>"


def _cells(name: str, load: LayerLoad) -> list[str]:
    entropy = "-" if load.router_entropy is None else f"{load.router_entropy:.3f}"
    losses = ", ".join(f"{loss} {value:.4g}" for loss, value in load.losses.items()) or "-"
    figures = [f"{load.max_over_mean:.2f}", f"{load.cv:.3f}", str(len(load.dead)), f"{load.drop_rate:.2%}"]
    return [name or "model", str(len(load.counts)), f"{load.rows:,}", *figures, entropy, losses]
