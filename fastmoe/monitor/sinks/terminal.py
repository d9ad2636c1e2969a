"""A table and a heat map in the terminal."""

from rich.console import Console
from rich.table import Table
from rich.text import Text

from fastmoe.monitor.snapshot import LayerLoad, LoadSnapshot

COLUMNS = ("layer", "rows", "max/mean", "cv", "entropy", "dead", "dropped", "router entropy")
CELLS_PER_LINE = 64


class Terminal:
    """Prints each snapshot: a row per layer, its load as one coloured cell per expert."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console()

    def write(self, step: int, snapshot: LoadSnapshot) -> None:
        self.console.print(load_table(snapshot, title=f"expert load at step {step}"))

    def close(self) -> None:
        """Nothing is kept."""


def load_table(snapshot: LoadSnapshot, title: str) -> Table:
    """One row per layer; the last column is its heat map."""
    table = Table(title=title, title_justify="left")
    for name in COLUMNS:
        table.add_column(name, justify="left" if name == "layer" else "right")
    table.add_column("load of each expert", no_wrap=True)
    for name, load in snapshot.items():
        table.add_row(*_figures(name, load), heat_cells(load))
    return table


def _figures(name: str, load: LayerLoad) -> list[str]:
    entropy = "-" if load.router_entropy is None else f"{load.router_entropy:.2f}"
    figures = [f"{load.rows:,}", f"{load.max_over_mean:.2f}", f"{load.cv:.2f}", f"{load.entropy:.2f}"]
    return [name, *figures, str(len(load.dead)), f"{load.drop_rate:.1%}", entropy]


def heat_cells(load: LayerLoad) -> Text:
    """A bar per expert, as high and as warm as its load: full is twice the mean or more; x is no row at all."""
    cells = Text()
    for expert, share in enumerate(load.share):
        if expert and expert % CELLS_PER_LINE == 0:
            cells.append("\n")
        heat = min(share * len(load.counts) / 2, 1.0)
        mark = "▁▂▃▄▅▆▇█"[min(int(heat * 8), 7)] if share else "x"
        cells.append(mark, style=f"rgb({round(60 + 195 * heat)},{round(160 - 80 * heat)},{round(220 - 190 * heat)})")
    return cells
