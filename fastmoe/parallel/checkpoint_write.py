"""Saving: what each process writes, and the order in which it becomes a checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn
from torch.distributed.checkpoint import FileSystemWriter, Metadata
from torch.distributed.checkpoint.storage import WriteResult
from torch.optim import Optimizer

from fastmoe.parallel.checkpoint_folder import CheckpointFolder, check_files, remove, sync_folder, write_document
from fastmoe.parallel.checkpoint_planner import PieceSavePlanner
from fastmoe.parallel.checkpoint_together import Together
from fastmoe.parallel.checkpoint_values import check_plain, group_options
from fastmoe.parallel.global_state import Piece, model_state, staged
from fastmoe.parallel.global_state_hidden import gather_pieces
from fastmoe.parallel.global_state_optimizer import owned, state_pieces, state_values


@dataclass(frozen=True)
class Draft:
    """A checkpoint that is not written yet; `document` is whole on the first process only."""

    pieces: list[Piece]
    document: dict[str, Any]


def prepare(
    model: nn.Module,
    optimizer: Optimizer | None,
    folder: CheckpointFolder,
    extra: object,
    overwrite: bool,
    together: Together,
) -> Draft:
    """Look at everything that can be wrong, before anything is written. Collective."""
    together.each(lambda: check_plain("extra", extra))
    own = together.each(lambda: _draft(model, optimizer, together.is_first))
    together.first(lambda: folder.begin(overwrite))
    optimizers = together.gather(lambda: own.document["optimizer"])
    document = {"extra": extra, "optimizer": _merged(optimizers)}
    return Draft(gather_pieces(own.pieces), document)


def stage(draft: Draft) -> Draft:
    """A copy in CPU memory, so that training may go on."""
    return replace(draft, pieces=[replace(piece, local=staged(piece)) for piece in draft.pieces])


def commit(draft: Draft, folder: CheckpointFolder, together: Together) -> None:
    """Write; when all have written, the first process gives it its name. Collective."""
    try:
        _write(draft, folder, together)
    except Exception:
        if together.is_first:
            remove(folder.partial)
        raise


def _write(draft: Draft, folder: CheckpointFolder, together: Together) -> None:
    planner = PieceSavePlanner(draft.pieces)
    writer = FileSystemWriter(folder.partial, sync_files=True)
    writer.set_up_storage_writer(together.is_first)
    plans = together.gather(lambda: writer.prepare_local_plan(planner.create_local_plan()))
    metadata = Metadata({})

    def plan_for_all() -> list[Any]:
        nonlocal metadata
        all_plans, metadata = planner.create_global_plan(plans)
        return writer.prepare_global_plan(all_plans)

    def write_own() -> list[WriteResult]:
        results = writer.write_data(plan, planner).wait() if plan.items else []
        sync_folder(folder.partial)
        return results

    def finish() -> None:
        check_files(folder.partial, (result.storage_data for results in everyone for result in results))
        write_document(folder.partial, draft.document)
        writer.finish(metadata, everyone)
        folder.publish()

    plan = together.scatter(plan_for_all)
    everyone = together.gather(write_own)
    together.first(finish)


def _draft(model: nn.Module, optimizer: Optimizer | None, is_first: bool) -> Draft:
    state = model_state(model)
    pieces = [replace(piece, name=f"model.{piece.name}") for piece in state.pieces.values()]
    if optimizer is None:
        return Draft(pieces, {"optimizer": None})
    pieces += [replace(piece, name=f"optimizer.{piece.name}") for piece in state_pieces(optimizer, state)]

    def told(name: str) -> bool:
        return is_first or state.expert(name) is not None

    groups: list[dict[str, Any]] = [{"options": options, "params": []} for options in group_options(optimizer)]
    for group, _, piece in owned(optimizer, state):
        if told(piece.name):
            groups[group]["params"].append(piece.name)
    values = {name: own for name, own in state_values(optimizer, state).items() if told(name)}
    return Draft(pieces, {"optimizer": {"groups": groups, "values": values}})


def _merged(optimizers: Sequence[dict[str, Any] | None]) -> dict[str, Any] | None:
    """The first process's, with the other processes' experts."""
    if not optimizers or (first := optimizers[0]) is None:
        return None
    for other in optimizers[1:]:
        assert other is not None
        for group, more in zip(first["groups"], other["groups"], strict=True):
            group["params"] = list(dict.fromkeys([*group["params"], *more["params"]]))
        first["values"] = other["values"] | first["values"]
    return first
