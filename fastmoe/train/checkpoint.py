"""The checkpoints of a run: which there are, the newest that can be read, and which of them go.

Each is a folder `step-<number>` that `fastmoe.save` wrote: under that name there is only ever a whole one. `extra`, in
its `fastmoe.json`, is what the run knows of itself.
"""

from __future__ import annotations

import pickle
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from fastmoe.parallel import CollectiveError
from fastmoe.parallel.checkpoint_folder import CheckpointFolder, remove, sync_folder
from fastmoe.parallel.checkpoint_read import open_checkpoint
from fastmoe.parallel.checkpoint_together import Together

T = TypeVar("T")

NAME = re.compile(r"step-(\d+)")
UNREADABLE = (RuntimeError, EOFError, OSError, ValueError, KeyError, pickle.UnpicklingError)


class OtherRunError(ValueError):
    """A checkpoint that is whole, but of another model or other data."""


def checkpoints(folder: Path) -> list[Path]:
    """Those in the folder, newest first."""
    steps = {path: int(match[1]) for path in folder.glob("step-*") if (match := NAME.fullmatch(path.name))}
    return sorted(steps, key=lambda path: steps[path], reverse=True)


def path_of(folder: Path, step: int) -> Path:
    return folder / f"step-{step:08d}"


def read_extra(path: Path) -> dict[str, Any]:
    """What the run knew of itself.

    Raises:
        ValueError: there is no checkpoint, or files of it are missing or too short.
    """
    opened = open_checkpoint(CheckpointFolder.of(path))
    opened.check_files()
    return opened.document["extra"]


def newest(folder: Path, read: Callable[[Path], T], together: Together | None = None) -> T | None:
    """What `read` makes of the newest checkpoint that it can read; None where there is none.

    Every process of `together` calls it, with a `read` that fails on all of them or on none.

    Raises:
        OtherRunError: as `read` does.
        ValueError: there are checkpoints, and none of them can be read.
    """
    together = together or Together()
    paths = together.all(checkpoints(folder))[0]
    for path in paths:
        try:
            return read(path)
        except (CollectiveError, OtherRunError):
            raise
        except UNREADABLE as error:
            if together.is_first:
                warnings.warn(f"{path} cannot be read, trying the one before it: {error}", stacklevel=2)
    if paths:
        raise ValueError(f"none of the {len(paths)} checkpoints in {folder} can be read")
    return None


def prune(folder: Path, keep: int, newest: Path | None = None) -> None:
    """Delete all but the `keep` newest up to `newest`, and what killed saves left.

    A checkpoint after `newest` is one that could not be read: the run has gone on from an earlier one.
    """
    paths = checkpoints(folder)
    first = paths.index(newest) if newest else 0
    kept = paths[first : first + keep]
    for path in paths:
        if path not in kept:
            delete(path)
    for path in folder.glob("step-*.partial"):
        remove(path)
    for path in folder.glob("step-*.memory"):
        if path.with_suffix("") not in kept:
            remove(path)


def delete(path: Path) -> None:
    """At once, as far as its name goes: a kill on the way leaves no part of a checkpoint under it."""
    going = CheckpointFolder.of(path).partial
    remove(going)
    if path.exists():
        path.rename(going)
        remove(going)
    remove(memory_beside(path))


def memory_beside(path: Path) -> Path:
    """Where a model's memory is until its checkpoint is there."""
    return path.with_name(f"{path.name}.memory")


def take_memory(path: Path) -> None:
    """Move the memory into its checkpoint."""
    if memory_beside(path).exists():
        memory_beside(path).rename(path / "memory")
        sync_folder(path)
