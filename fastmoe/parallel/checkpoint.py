"""Checkpoints that any number of processes write and any other number reads: `save` and `load`."""

from __future__ import annotations

import os
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, Literal, overload

from torch import nn

if TYPE_CHECKING:
    from torch.optim import Optimizer

    Directory = str | os.PathLike[str]


class PendingSave:
    """A checkpoint that is being written while training goes on; see `save`."""

    def __init__(self, future: Future[None]) -> None:
        self._future = future

    def done(self) -> bool:
        """Whether the checkpoint is there, or has failed; processes may learn of it at different times."""
        return self._future.done()

    def wait(self) -> None:
        """Return when the checkpoint is there under its own name; raise what went wrong with it, on every process.

        Not collective: it waits for the other processes' writing, not for their `wait`.
        """
        global _pending
        try:
            self._future.result()
        finally:
            if self._future.done() and _pending is self:
                _pending = None


_pending: PendingSave | None = None


@overload
def save(
    model: nn.Module,
    optimizer: Optimizer | None,
    directory: Directory,
    *,
    extra: Any = None,
    asynchronous: Literal[False] = False,
    overwrite: bool = False,
) -> None: ...
@overload
def save(
    model: nn.Module,
    optimizer: Optimizer | None,
    directory: Directory,
    *,
    extra: Any = None,
    asynchronous: Literal[True],
    overwrite: bool = False,
) -> PendingSave: ...
def save(
    model: nn.Module,
    optimizer: Optimizer | None,
    directory: Directory,
    *,
    extra: Any = None,
    asynchronous: bool = False,
    overwrite: bool = False,
) -> PendingSave | None:
    """Write a checkpoint that knows nothing of how the model was spread over processes.

    It is a folder of `torch.distributed.checkpoint`: the tensors of the unsharded model's state_dict, with all experts
    in one tensor where they are stacked, under `model.<name>`; the optimizer's under `optimizer.<parameter>.<key>`;
    and, in `fastmoe.json`, the options of its parameter groups and `extra`. Each process writes its own experts and a
    share of what all of them hold. `load` reads it on any number of processes, spread in any way.

    Under its own name there is only ever a whole checkpoint: it is written to `<directory>.partial`, flushed to the
    disk and renamed when every process is done. With `overwrite`, the old one is renamed to `<directory>.previous`
    just before, where `load` finds it, and deleted after. What a killed save has left goes with the next save to the
    same directory.

    Every process of the default group must call it; without `torch.distributed` there is only this one. `directory`
    must be on a disk that all processes share.

    Args:
        model: sharded by `fastmoe.parallelize` or not.
        optimizer: of the model's parameters; None to leave it out.
        directory: of the checkpoint.
        extra: plain values to keep with it (numbers, strings, bools, None, lists and dicts of them); those of the
            first process.
        asynchronous: return as soon as this process's tensors are copied to CPU memory; a thread writes them. The
            processes need gloo. `wait()` for it before the processes leave their default group; the next save waits
            for it in any case, and raises what went wrong with it.
        overwrite: replace a checkpoint that is there already.

    Returns:
        None when the checkpoint is there; with `asynchronous`, what to wait for.

    Raises:
        ValueError: on every process, if the directory is taken, or something cannot be kept; nothing is written then.
        OSError: on every process, if one cannot write.
        CollectiveError: another process died.
    """
    from fastmoe.parallel.checkpoint_folder import CheckpointFolder
    from fastmoe.parallel.checkpoint_together import Together
    from fastmoe.parallel.checkpoint_write import commit, prepare, stage

    global _pending
    if _pending is not None:
        _pending.wait()
    folder, together = CheckpointFolder.of(directory), Together.everyone()
    draft = prepare(model, optimizer, folder, extra, overwrite, together)
    if not asynchronous:
        commit(draft, folder, together)
        return None
    background, copied = together.in_background(), together.each(lambda: stage(draft))
    executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="fastmoe.save")
    _pending = PendingSave(executor.submit(commit, copied, folder, background))
    executor.shutdown(wait=False)
    return _pending


def load(model: nn.Module, optimizer: Optimizer | None, directory: Directory) -> Any:
    """Load what `save` wrote, into a model and an optimizer that may be spread over processes in another way.

    Each process reads its own experts. The optimizer's state is made anew, also where no step was taken yet; the
    options of its parameter groups become those of the checkpoint. The checkpoint is compared with model and optimizer
    first: if anything does not fit, both stay as they were.

    Every process of the default group must call it; without `torch.distributed` there is only this one.

    Args:
        model: sharded by `fastmoe.parallelize` or not.
        optimizer: of the model's parameters; None to leave it as it is.
        directory: of the checkpoint. Its `.metadata` is a pickle of PyTorch's: load none that you do not trust.

    Returns:
        What was given to `save` as `extra`.

    Raises:
        ValueError: on every process, if there is no checkpoint, or names, shapes, dtypes, experts or parameter groups
            are not those of the checkpoint, or parts of it are missing; the message names them all.
    """
    from fastmoe.parallel.checkpoint_folder import CheckpointFolder
    from fastmoe.parallel.checkpoint_read import load as read
    from fastmoe.parallel.checkpoint_together import Together

    if _pending is not None:
        _pending.wait()
    return read(model, optimizer, CheckpointFolder.of(directory), Together.everyone())
