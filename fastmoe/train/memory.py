"""What a model with memory carries from one segment to the next, and how a resumed run gets it back.

Memory depends on the weights of past steps, so it cannot be computed again: it is saved beside each checkpoint, one
file for each micro-step on each process.
"""

from __future__ import annotations

import pickle
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

Memory = Tensor | None  # the sequences in dimension 1


def path_of(folder: Path, step: int, part: int) -> Path:
    return folder / f"memory-{step:08d}-{part}.pt"


def save_memory(folder: Path, step: int, memories: dict[int, Memory]) -> None:
    """Write each part's memory: under its name there is only ever a whole file."""
    folder.mkdir(parents=True, exist_ok=True)
    for part, memory in memories.items():
        path = path_of(folder, step, part)
        partial = path.with_suffix(".partial")
        torch.save(memory, partial)
        partial.replace(path)


def load_memory(folder: Path, step: int, parts: Iterable[int], device: torch.device) -> list[Memory]:
    """What `save_memory` wrote.

    Raises:
        ValueError: a file is missing, or cannot be read.
    """
    try:
        return [torch.load(path_of(folder, step, part), device, weights_only=True) for part in parts]
    except (OSError, EOFError, RuntimeError, pickle.UnpicklingError) as error:
        raise ValueError(f"the memory of step {step} in {folder} cannot be read: {error}") from error


def prune_memory(folder: Path, steps: set[int]) -> None:
    """Delete the memory of all but these steps."""
    for path in folder.glob("memory-*"):
        if int(path.name.split("-")[1].partition(".")[0]) not in steps:
            path.unlink(missing_ok=True)
