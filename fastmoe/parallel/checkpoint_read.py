"""Loading: what a checkpoint says of itself is compared with what is here, then each process reads its own."""

from __future__ import annotations

import pickle
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.distributed.checkpoint import FileSystemReader, Metadata
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.optim import Optimizer

from fastmoe.parallel.checkpoint_check import Problem, compare_names, compare_tensors, report
from fastmoe.parallel.checkpoint_folder import CheckpointFolder, check_files, read_document
from fastmoe.parallel.checkpoint_planner import PieceLoadPlanner
from fastmoe.parallel.checkpoint_together import Together
from fastmoe.parallel.checkpoint_values import restore_options
from fastmoe.parallel.global_state import ModelState, Piece, model_state
from fastmoe.parallel.global_state_hidden import buffers_for, take_pieces
from fastmoe.parallel.global_state_optimizer import Saved, fresh, owned

UNREADABLE = (OSError, EOFError, pickle.UnpicklingError, ValueError, AttributeError, ImportError, IndexError, KeyError)


@dataclass(frozen=True)
class Opened:
    """A checkpoint's folder and what it says of itself."""

    folder: Path
    document: dict[str, Any]
    metadata: Metadata

    def tensors(self, prefix: str) -> dict[str, TensorStorageMetadata]:
        """What it says of each tensor whose name begins so, by the rest of the name."""
        return {
            name.removeprefix(prefix): tensor
            for name, tensor in self.metadata.state_dict_metadata.items()
            if name.startswith(prefix) and isinstance(tensor, TensorStorageMetadata)
        }

    def read(self, pieces: Iterable[Piece]) -> None:
        """Fill the pieces."""
        reader = FileSystemReader(self.folder)
        reader.set_up_storage_reader(self.metadata, is_coordinator=True)
        planner = PieceLoadPlanner(pieces, self.metadata)
        reader.read_data(planner.create_local_plan(), planner).wait()

    def check_files(self) -> None:
        check_files(self.folder, self.metadata.storage_data.values())


def open_checkpoint(folder: CheckpointFolder) -> Opened:
    """Read what a checkpoint says of itself.

    Raises:
        ValueError: there is none, or it cannot be read.
    """
    found = folder.whole()
    document = read_document(found)
    try:
        metadata = FileSystemReader(found).read_metadata()
    except UNREADABLE as error:
        raise ValueError(f"{found / '.metadata'} cannot be read: {error!r}") from error
    return Opened(found, document, metadata)


@dataclass
class Target:
    """What is to be loaded into: pieces by their names in the checkpoint, and state for the optimizer."""

    pieces: list[Piece]
    state: dict[Tensor, dict[str, Any]] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)


def load(model: nn.Module, optimizer: Optimizer | None, folder: CheckpointFolder, together: Together) -> Any:
    """See `fastmoe.load`."""
    opened = together.each(lambda: open_checkpoint(folder))
    target = together.each(lambda: _target(model, optimizer, opened))
    problems = [problem for own in together.all(target.problems) for problem in own]
    if problems:
        raise ValueError(report(f"{opened.folder} does not fit:", problems))
    together.first(opened.check_files)
    buffers = together.each(lambda: buffers_for(target.pieces))
    together.each(lambda: opened.read(buffers))
    take_pieces(target.pieces, buffers)
    if optimizer is not None:
        _restore(optimizer, target.state, opened.document["optimizer"]["groups"])
    return opened.document["extra"]


def _restore(optimizer: Optimizer, state: dict[Tensor, dict[str, Any]], groups: list[dict[str, Any]]) -> None:
    for param, own in state.items():
        optimizer.state.pop(param, None)
        if own:
            optimizer.state[param] = own
    restore_options(optimizer, [group["options"] for group in groups])


def _target(model: nn.Module, optimizer: Optimizer | None, opened: Opened) -> Target:
    state = model_state(model)
    pieces, saved = list(state.pieces.values()), opened.tensors("model.")
    target = Target([replace(piece, name=f"model.{piece.name}") for piece in pieces])
    target.problems += compare_names("parameters and buffers", state.pieces, saved, state)
    target.problems += compare_tensors(pieces, saved)
    if optimizer is not None:
        if opened.document["optimizer"] is None:
            raise ValueError(f"{opened.folder} was saved without an optimizer: give None as the optimizer")
        target.problems += _compare_groups(optimizer, state, opened.document["optimizer"]["groups"])
    if optimizer is not None and not target.problems:
        _add_optimizer(target, optimizer, state, opened)
    return target


def _compare_groups(optimizer: Optimizer, state: ModelState, groups: list[dict[str, Any]]) -> Iterator[Problem]:
    if len(groups) != (number := len(optimizer.param_groups)):
        yield Problem(f"the number of the optimizer's parameter groups: {number} here, {len(groups)} in the checkpoint")
        return
    there = {name: g for g, group in enumerate(groups) for name in group["params"]}
    here = {piece.name: g for g, _, piece in owned(optimizer, state)}
    yield from compare_names("parameters of the optimizer", here, there, state)
    for name, g in here.items():
        if there.get(name, g) != g:
            moved = f"{name}: {g} here, {there[name]} in the checkpoint"
            yield Problem("parameters in another group of the optimizer: {}", (moved,))


def _add_optimizer(target: Target, optimizer: Optimizer, state: ModelState, opened: Opened) -> None:
    saved: defaultdict[str, dict[str, TensorStorageMetadata]] = defaultdict(dict)
    for name, tensor in opened.tensors("optimizer.").items():
        param_name, _, key = name.rpartition(".")
        saved[param_name][key] = tensor
    groups, values = opened.document["optimizer"]["groups"], opened.document["optimizer"]["values"]
    for g, param, piece in owned(optimizer, state):
        target.state[param] = dict(values.get(piece.name, {}))
        for key, tensor in saved[piece.name].items():
            about = Saved(tuple(tensor.size), tensor.properties.dtype)
            target.state[param][key], part = fresh(piece, param, key, about, groups[g]["options"])
            target.pieces.append(replace(part, name=f"optimizer.{part.name}"))
            target.problems += compare_tensors([part], {part.name: tensor})
