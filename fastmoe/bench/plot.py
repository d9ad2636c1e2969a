"""A result as a picture."""

from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from fastmoe.bench import huggingface
from fastmoe.bench.contenders import OURS
from fastmoe.bench.peers import LAYERS

PLAIN = ("F.grouped_mm", "ModuleList loop", "brute-force loop")


def plot(result: dict, path: Path) -> None:
    """Bars over the floor; or, where only E varies, times over it, as in figure 5 of the FastMoE paper."""
    shapes = {tuple(size for letter, size in row["shape"].items() if letter != "E") for row in result["rows"]}
    experts = {row["shape"]["E"] for row in result["rows"]}
    figure = _sweep(result) if len(shapes) == 1 and len(experts) > 2 else _bars(result)
    figure.suptitle(caption(result), fontsize=8)
    figure.savefig(path, dpi=130)


def caption(result: dict) -> str:
    m = result["machine"]
    return (
        f"{m.get('gpu', m['cpu'])}, {m['threads']} CPU threads, torch {m['torch']}, commit {m['commit']}, {m['date']}"
    )


def _figure(width: float, height: float) -> Figure:
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _sweep(result: dict) -> Figure:
    figure = _figure(10, 4)
    modes = list(result["rows"][0]["modes"])
    for mode, axes in zip(modes, figure.subplots(1, len(modes), squeeze=False)[0], strict=True):
        names = dict.fromkeys(name for row in result["rows"] for name in row["modes"][mode]["contenders"])
        for name in names:
            if name in LAYERS:
                continue
            rows = sorted(
                (row for row in result["rows"] if name in row["modes"][mode]["contenders"]),
                key=lambda row: row["shape"]["E"],
            )
            times = [row["modes"][mode]["contenders"][name]["median_ms"] for row in rows]
            axes.plot([row["shape"]["E"] for row in rows], times, marker="o", label=name)
        axes.set(xscale="log", yscale="log", xlabel="experts", ylabel="ms", title=mode)
        axes.set_xticks([row["shape"]["E"] for row in result["rows"]], [str(r["shape"]["E"]) for r in result["rows"]])
        axes.grid(alpha=0.3)
        axes.legend(fontsize=7)
    return figure


def _bars(result: dict) -> Figure:
    rows = [row for row in result["rows"] if row["activation"] == result["rows"][0]["activation"]]
    dtypes = list(dict.fromkeys(row["dtype"] for row in rows))
    figure = _figure(6 * len(dtypes), 1 + 1.1 * len(rows) / len(dtypes))
    for dtype, axes in zip(dtypes, figure.subplots(1, len(dtypes), squeeze=False)[0], strict=True):
        _panel(axes, [row for row in rows if row["dtype"] == dtype])
        axes.set_title(dtype)
    return figure


def _panel(axes: Axes, rows: list[dict]) -> None:
    ran = {name for row in rows for found in row["modes"].values() for name in found["contenders"]}
    names = [OURS, *(PLAIN if ran.intersection(PLAIN) else reversed(huggingface.NAMES))]
    labels = []
    for i, row in enumerate(rows):
        mode, found = list(row["modes"].items())[-1]
        labels.append(f"{', '.join(map(str, row['shape'].values()))}\n{mode}")
        for j, name in enumerate(names):
            if name in found["contenders"]:
                value = found["contenders"][name]["over_floor"]
                axes.barh(i + 0.2 * j - 0.3, value, 0.18, color=f"C{j}", label=name if i == 0 else None)
                axes.text(value, i + 0.2 * j - 0.3, f" {value:.1f}", va="center", fontsize=6)
    axes.set(xscale="log", xlabel="time / floor")
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_yticks(range(len(rows)), labels, fontsize=7)
    axes.invert_yaxis()
    axes.legend(fontsize=7)
