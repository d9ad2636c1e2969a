"""What a model with memory carries from one segment to the next, and how a resumed run gets it back.

Memory depends on the weights of past steps, so it cannot be computed again: it is saved beside each checkpoint, one
file for each part of a batch, that is for each micro-step on each process.
"""

from __future__ import annotations

import pickle
import warnings
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

Memory = Tensor | None  # the sequences in dimension 1


@dataclass
class Memories:
    """This process's, one for each of its micro-steps; None at the start, and always where the model has none."""

    folder: Path
    micro_steps: int
    rank: int
    processes: int
    values: list[Memory] = field(init=False)

    def __post_init__(self) -> None:
        self.values = [None] * self.micro_steps

    @property
    def saved_parts(self) -> int:
        """How many files all processes write; none for a model without memory."""
        return self.micro_steps * self.processes if any(value is not None for value in self.values) else 0

    def _path(self, step: int, micro_step: int) -> Path:
        return self.folder / f"memory-{step:08d}-{micro_step * self.processes + self.rank}.pt"

    def save(self, step: int) -> None:
        """Write it: under its name there is only ever a whole file."""
        if not self.saved_parts:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        for micro_step, value in enumerate(self.values):
            path = self._path(step, micro_step)
            partial = path.with_suffix(".partial")
            torch.save(value, partial)
            partial.replace(path)

    def restore(self, step: int, parts: int, device: torch.device) -> None:
        """What `save` wrote, if the batch has as many parts as it had; else empty, which a few steps feel.

        Raises:
            ValueError: a file is missing, or cannot be read.
        """
        own = self.micro_steps * self.processes
        self.values = [None] * self.micro_steps
        if parts == own:
            self.values = [self._load(self._path(step, micro_step), device) for micro_step in range(self.micro_steps)]
        elif parts and self.rank == 0:
            warnings.warn(
                f"memory was saved in {parts} parts and is needed in {own} (micro-steps * processes): it starts empty",
                stacklevel=2,
            )

    @staticmethod
    def _load(path: Path, device: torch.device) -> Memory:
        try:
            return torch.load(path, device, weights_only=True)
        except (OSError, EOFError, RuntimeError, pickle.UnpicklingError) as error:
            raise ValueError(f"{path} cannot be read: {error}") from error


def prune_memory(folder: Path, steps: set[int]) -> None:
    """Delete the memory of all but these steps."""
    for path in folder.glob("memory-*"):
        if int(path.name.split("-")[1].partition(".")[0]) not in steps:
            path.unlink(missing_ok=True)
