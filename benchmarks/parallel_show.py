"""The tables of benchmarks/parallel.py."""

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table


def show_scaling(sizes: dict[str, dict], cores: int) -> None:
    table = _table(
        f"Weak scaling, {cores} cores, one thread for each process; a step is forward, backward and optimizer",
        ("processes", "step, ms", "quartiles", "efficiency", "in exchange", "busiest", "apart, ms", "of apart"),
    )
    for size, found in sizes.items():
        table.add_row(
            size,
            f"{found['step_ms']['median']:.1f}",
            f"{found['step_ms']['q1']:.1f}-{found['step_ms']['q3']:.1f}",
            f"{found['efficiency']['median']:.0%}",
            f"{found['exchange_share']['median']:.0%}",
            f"{found['busiest']:.2f}",
            f"{found['apart_ms']['median']:.1f}",
            f"{found['of_apart']['median']:.0%}",
        )
    _print(table)
    print("efficiency: one process's time over that of so many. busiest: its rows over the mean of all processes.")
    print("apart: as many processes at once, each with a model of its own.")
    if cores < max(map(int, sizes)):
        print(f"More than {cores} processes share {cores} cores: at 4 the best efficiency possible is {cores / 4:.0%}.")


def show_memory(sizes: dict[str, dict]) -> None:
    table = _table(
        "Memory: the model grows with the processes",
        ("processes", "experts", "parameters", "in each process", "peak of each, MiB", "most"),
    )
    for size, found in sizes.items():
        peaks = found["peak_mib"]
        table.add_row(
            size,
            str(found["experts"]),
            f"{found['parameters']:,}",
            f"{found['parameters_here']:,}",
            ", ".join(f"{peak:.0f}" for peak in peaks),
            f"{max(peaks):.0f}",
        )
    _print(table)


def show_links(megabits: int, found: dict) -> None:
    link = found["link"]
    for case in found["cases"]:
        title = (
            f"{megabits} Mbit/s (measured {link['megabits']:.0f}), round trip {link['round_trip_ms']:.2f} ms; "
            f"T {found['job']['tokens']}, E {found['job']['experts']}, D {found['job']['d_model']}, "
            f"H {found['d_hidden']}, K {case['top_k']}"
        )
        headings = ("way", "step, ms", "quartiles", "of plain", "quartiles", "compute, ms", "exchange, ms", "MB sent")
        table = _table(title, headings)
        for way, figures in case["ways"].items():
            table.add_row(way, *_cells(figures))
        _print(table)


def _cells(figures: dict) -> list[str]:
    step, ratio = figures["step_ms"], figures["of_plain"]
    return [
        f"{step['median']:.0f}",
        f"{step['q1']:.0f}-{step['q3']:.0f}",
        f"{ratio['median']:.3f}",
        f"{ratio['q1']:.3f}-{ratio['q3']:.3f}",
        f"{figures['compute_ms']['median']:.0f}",
        f"{figures['exchange_ms']['median']:.0f}",
        f"{figures['bytes_sent'] / 1e6:.2f}",
    ]


def _table(title: str, headings: Sequence[str]) -> Table:
    table = Table(title=title, title_justify="left")
    for number, heading in enumerate(headings):
        table.add_column(heading, justify="right" if number else "left", no_wrap=not number)
    return table


def _print(table: Table) -> None:
    console = Console()
    console.width = max(console.width, 120)
    console.print(table)
