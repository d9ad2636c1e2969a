"""What a run remembers of itself; it is saved in every checkpoint."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

BITS = 1 / math.log(2)


@dataclass
class History:
    """Losses are in bits per byte; `seconds` counts training alone, not evaluation, logging and saving."""

    losses: list[float] = field(default_factory=list)
    """Training loss of each step."""
    seconds: float = 0.0
    valid_steps: list[int] = field(default_factory=list)
    valid_seconds: list[float] = field(default_factory=list)
    valid_losses: list[float] = field(default_factory=list)
    loads: list[list[list[float]]] = field(default_factory=list)
    """At each evaluation, for each MoE layer, the share of the last training step's rows that each expert got."""

    def add_evaluation(self, step: int, loss: float, load: list[list[float]]) -> None:
        self.valid_steps.append(step)
        self.valid_seconds.append(self.seconds)
        self.valid_losses.append(loss)
        self.loads.append(load)

    def to_plain(self) -> dict[str, Any]:
        return asdict(self)


def busiest(load: list[list[float]]) -> float:
    """The busiest expert's load over the mean load, of the layer where that is largest; 1 is even."""
    return max((max(layer) * len(layer) for layer in load), default=1.0)


def loss_at(seconds: float, history: History) -> float:
    """Validation loss after so many seconds of training, interpolated between evaluations."""
    times, losses = history.valid_seconds, history.valid_losses
    for i in range(1, len(times)):
        if seconds <= times[i]:
            return interpolate(seconds, times[i - 1], times[i], losses[i - 1], losses[i])
    return losses[-1]


def steps_to_reach(loss: float, history: History) -> float | None:
    """Steps after which validation loss was first at most `loss`, interpolated between evaluations; None if never."""
    return first_reached(loss, history.valid_steps, history.valid_losses)


def first_reached(loss: float, xs: Sequence[float], losses: Sequence[float]) -> float | None:
    """Where along `xs` the losses were first at most `loss`, interpolated; None if nowhere."""
    for i, reached in enumerate(losses):
        if reached <= loss:
            return interpolate(loss, losses[i - 1], reached, xs[i - 1], xs[i]) if i else float(xs[0])
    return None


def interpolate(x: float, x0: float, x1: float, y0: float, y1: float) -> float:
    return y1 if x1 == x0 else y0 + (y1 - y0) * (x - x0) / (x1 - x0)
