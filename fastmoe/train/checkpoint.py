"""Checkpoints that survive a kill at any moment.

A checkpoint is written under a temporary name, flushed to the disk and renamed: under its own name there is only ever
a whole one. It holds tensors and plain Python values, for `torch.load(..., weights_only=True)`.
"""

from __future__ import annotations

import os
import pickle
import re
import warnings
from pathlib import Path
from typing import Any

import torch

NAME = re.compile(r"step-(\d+)\.pt")
TEMPORARY = ".partial"
UNREADABLE = (RuntimeError, EOFError, OSError, ValueError, KeyError, pickle.UnpicklingError)


def checkpoints(folder: Path) -> list[Path]:
    """Whole checkpoints in the folder, newest first."""
    steps = {path: int(match[1]) for path in folder.glob("step-*.pt") if (match := NAME.fullmatch(path.name))}
    return sorted(steps, key=lambda path: steps[path], reverse=True)


def save(state: dict[str, Any], folder: Path, step: int, keep: int) -> Path:
    """Write `state` as this step's checkpoint, then delete all but the `keep` newest."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"step-{step:08d}.pt"
    partial = path.with_suffix(TEMPORARY)
    with partial.open("wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)
    sync_folder(folder)
    for old in [*checkpoints(folder)[keep:], *folder.glob(f"step-*{TEMPORARY}")]:
        old.unlink()
    return path


def sync_folder(folder: Path) -> None:
    """Bring the rename itself to the disk; Windows has no such call for folders."""
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def load(path: Path) -> dict[str, Any]:
    return torch.load(path, map_location="cpu", weights_only=True)


def load_newest(folder: Path) -> tuple[Path, dict[str, Any]] | None:
    """The newest checkpoint that can be read; None where there is none.

    Raises:
        ValueError: there are checkpoints, and none of them can be read.
    """
    found = checkpoints(folder)
    for path in found:
        try:
            return path, load(path)
        except UNREADABLE as error:
            warnings.warn(f"{path} cannot be read, trying the one before it: {error}", stacklevel=2)
    if found:
        raise ValueError(f"none of the {len(found)} checkpoints in {folder} can be read")
    return None


def delete_all(folder: Path) -> None:
    for path in [*checkpoints(folder), *folder.glob(f"step-*{TEMPORARY}")]:
        path.unlink()
