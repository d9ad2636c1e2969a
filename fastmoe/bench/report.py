"""A result as tables on the terminal."""

from collections.abc import Iterator

from rich.console import Console
from rich.table import Table

from fastmoe.bench.contenders import DENSE


def show_row(console: Console, row: dict) -> None:
    """One problem: every contender beside ours and the floor, then who did not run."""
    shape = ", ".join(f"{letter} {size}" for letter, size in row["shape"].items())
    for mode, found in row["modes"].items():
        title = (
            f"{shape}, {row['dtype']}, {row['activation']}, {mode}: floor {found['floor_ms']:.2f} ms "
            f"(dense {found['dense_ms']:.2f}, bytes {found['bytes_ms']:.2f} at {row['copy_gb_per_s']:.1f} GB/s)"
        )
        table = Table(title=title, title_justify="left")
        for heading in ("contender", "median, ms", "over floor", "times ours", "quartiles", "rounds"):
            first = heading == "contender"
            table.add_column(heading, justify="left" if first else "right", no_wrap=first)
        for name, cells in _cells(found["contenders"]):
            table.add_row(name, *cells)
        console.print(table)
    if row.get("extra_mib"):
        ours, dense = row["extra_mib"]["fastmoe"], row["extra_mib"][DENSE]
        console.print(
            f"extra memory: fastmoe {ours:.0f} MiB, dense MLP {dense:.0f} MiB, {ours / max(dense, 1):.2f} times"
        )
    for name, reason in row["left_out"].items():
        console.print(f"left out: {name}: {reason}", highlight=False)


def _cells(contenders: dict[str, dict]) -> Iterator[tuple[str, list[str]]]:
    for name, figure in contenders.items():
        low, high = figure["spread"]
        yield (
            name,
            [
                f"{figure['median_ms']:.2f}",
                f"{figure['over_floor']:.2f}",
                f"{figure['times_ours']:.2f}",
                f"{low:.2f}-{high:.2f}",
                str(figure["rounds"]),
            ],
        )
