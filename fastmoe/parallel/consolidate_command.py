"""`fastmoe consolidate`: a checkpoint as one safetensors file, with the names of the unsharded model."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from fastmoe.parallel.checkpoint_check import compare_tensors, report
from fastmoe.parallel.checkpoint_folder import CheckpointFolder, sync_folder
from fastmoe.parallel.checkpoint_read import Opened, open_checkpoint
from fastmoe.parallel.global_state import Piece

OPTIMIZER = "optimizer."


def main(arguments: Sequence[str]) -> int:
    """Write the file; 0: done; 2: there is no checkpoint, or it cannot be read or written."""
    parser = argparse.ArgumentParser(
        prog="fastmoe consolidate", description="Write a checkpoint of fastmoe.save as one safetensors file."
    )
    parser.add_argument("directory", type=Path, help="the checkpoint")
    parser.add_argument("out", type=Path, help="the file to write; one that is there is replaced")
    parser.add_argument(
        "--optimizer",
        action="store_true",
        help="also the optimizer's tensors, as optimizer.<parameter>.<key>, and the rest of its state as metadata",
    )
    given = parser.parse_args(arguments)
    try:
        size = consolidate(given.directory, given.out, optimizer=given.optimizer)
    except (ValueError, OSError, SafetensorError) as error:
        print(f"fastmoe consolidate: {error}", file=sys.stderr)
        return 2
    print(f"written: {given.out} ({size} tensors)")
    return 0


def consolidate(directory: Path, out: Path, *, optimizer: bool = False) -> int:
    """Write the file, and say how many tensors it has. All of them are in memory at once.

    Raises:
        ValueError: there is no whole checkpoint, or it has no optimizer.
        OSError: the file cannot be written.
    """
    if out.is_dir():
        raise ValueError(f"{out} is a folder, expected the name of a file")
    if not out.parent.is_dir():
        raise ValueError(f"there is no folder {out.parent}")
    opened = open_checkpoint(CheckpointFolder.of(directory))
    opened.check_files()
    tensors, about = read(opened, "model."), {"format": "pt"}
    if optimizer:
        if opened.document["optimizer"] is None:
            raise ValueError(f"{opened.folder} was saved without an optimizer")
        state = {f"{OPTIMIZER}{name}": tensor for name, tensor in read(opened, OPTIMIZER).items()}
        if both := sorted(state.keys() & tensors.keys()):
            raise ValueError(f"model and optimizer both have tensors named {', '.join(both)}: leave --optimizer out")
        tensors |= state
        about["optimizer"] = json.dumps(opened.document["optimizer"])
    write(tensors, out, about)
    return len(tensors)


def read(opened: Opened, prefix: str) -> dict[str, Tensor]:
    """The whole tensors whose names begin so, by the rest of the name.

    Raises:
        ValueError: the checkpoint lacks parts of them.
    """
    saved = opened.tensors(prefix)
    tensors = {name: torch.empty(about.size, dtype=about.properties.dtype) for name, about in saved.items()}
    pieces = [Piece(name, tensor, tuple(tensor.shape), (0,) * tensor.dim()) for name, tensor in tensors.items()]
    if problems := list(compare_tensors(pieces, saved)):
        raise ValueError(report(f"{opened.folder} is not whole:", problems))
    opened.read(Piece(f"{prefix}{piece.name}", piece.local, piece.shape, piece.offset) for piece in pieces)
    return tensors


def write(tensors: dict[str, Tensor], out: Path, about: dict[str, str]) -> None:
    """Under its own name there is only ever a whole file."""
    partial = out.with_name(f"{out.name}.partial")
    try:
        save_file(tensors, partial, metadata=about)
        with partial.open("rb+") as file:
            os.fsync(file.fileno())
        partial.replace(out)
    finally:
        partial.unlink(missing_ok=True)
    sync_folder(out.parent)
