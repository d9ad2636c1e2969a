"""What a model with memory carries from one segment to the next, and how a resumed run gets it back.

Memory depends on the weights of past steps, so it cannot be computed again: it is part of a checkpoint, one file for
each part of a batch, that is for each micro-step on each process. It is written beside the checkpoint before that is
there, and moved into it after, so that a checkpoint has its memory at every moment.
"""

from __future__ import annotations

import os
import pickle
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from fastmoe.parallel.checkpoint_folder import sync_folder
from fastmoe.train.batches import Share
from fastmoe.train.checkpoint import memory_beside

Memory = Tensor | None  # the sequences in dimension 1


@dataclass
class Memories:
    """This process's, one for each of its micro-steps; None at the start, and always where the model has none."""

    micro_steps: int
    rank: int
    processes: int
    values: list[Memory] = field(init=False)

    def __post_init__(self) -> None:
        self.values = [None] * self.micro_steps

    def parts_to_save(self) -> int:
        """How many files all processes write; none where there is nothing to remember."""
        return self.micro_steps * self.processes if any(value is not None for value in self.values) else 0

    def save(self, checkpoint: Path) -> None:
        """Write this process's, before the checkpoint."""
        if not self.parts_to_save():
            return
        memory_beside(checkpoint).mkdir(parents=True, exist_ok=True)
        for micro_step, value in enumerate(self.values):
            with (memory_beside(checkpoint) / file_name(micro_step * self.processes + self.rank)).open("wb") as file:
                torch.save(value, file)
                file.flush()
                os.fsync(file.fileno())
        sync_folder(memory_beside(checkpoint))

    def restore(self, checkpoint: Path, parts: int, device: torch.device) -> None:
        """What all processes wrote in so many parts, cut for these micro-steps and processes.

        Raises:
            ValueError: a file is missing, or cannot be read.
        """
        self.values = [None] * self.micro_steps
        if not parts:
            return
        folder = checkpoint / "memory"
        folder = folder if folder.is_dir() else memory_beside(checkpoint)
        rows = torch.cat([read(folder / file_name(part)) for part in range(parts)], dim=1)
        for micro_step in range(self.micro_steps):
            mine = Share(micro_step, self.micro_steps, self.rank, self.processes).of(torch.arange(rows.shape[1]))
            self.values[micro_step] = rows[:, mine].to(device)


def file_name(part: int) -> str:
    return f"{part}.pt"


def read(path: Path) -> Tensor:
    try:
        return torch.load(path, "cpu", weights_only=True)
    except (OSError, EOFError, RuntimeError, pickle.UnpicklingError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
