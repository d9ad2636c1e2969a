"""Where snapshots go. Each sink is a file of its own, which alone imports the library that it draws with."""

from typing import Protocol

from fastmoe.monitor.snapshot import LoadSnapshot


class Sink(Protocol):
    """Takes snapshots in the order of their steps."""

    def write(self, step: int, snapshot: LoadSnapshot) -> None: ...

    def close(self) -> None: ...


def over_time(records: list[tuple[int, LoadSnapshot]], layer: str) -> tuple[list[int], list[list[float]]]:
    """Steps, and for each expert its load over the mean load at those steps; 1 is even."""
    steps = [step for step, _ in records]
    loads = [snapshot[layer] for _, snapshot in records]
    return steps, [[load.share[expert] * len(load.counts) for load in loads] for expert in range(len(loads[-1].counts))]
