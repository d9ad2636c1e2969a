"""`save_checkpoint` and `load_checkpoint`: folders that any layout of processes writes and any other reads."""

import logging
import os
from pathlib import Path
from typing import Any

from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.validation import StrictHandling
from megatron.core.utils import unwrap_model
from torch.distributed.checkpoint.api import CheckpointException

from fastmoe._errors import check_int
from fastmoe.parallel.checkpoint_folder import CheckpointFolder, sync_folder, write_document
from fastmoe.parallel.checkpoint_together import Together
from fmoe.megatron.optimizer_state import OptimizerState
from fmoe.megatron.random_state import RandomState

TRACKER = "latest_checkpointed_iteration.txt"

Directory = str | os.PathLike[str]

logger = logging.getLogger("fastmoe")


def save_checkpoint(iteration: int, model: Any, optimizer: Any, lr_scheduler: Any, save: Directory) -> None:
    """Write `save/iter_0000100` for iteration 100, and its number in `save/latest_checkpointed_iteration.txt`.

    It is a distributed checkpoint of Megatron-Core, whose experts go by their numbers in the whole layer, with the
    optimizer's state in a form that knows nothing of expert parallelism, and the state of each process's random
    numbers. It is written to `iter_0000100.partial` and renamed when every process is done, before the number is
    written: a process that is killed leaves the checkpoint that was there before. One of the same number is replaced.

    Every process must call it, and all must share the disk.

    Args:
        iteration: the step's number, from 1.
        model: wrapped or not, or a list of it alone; without virtual pipeline stages.
        optimizer: of Megatron-Core; None to leave it out.
        lr_scheduler: with `state_dict`; None to leave it out.
        save: folder of checkpoints.

    Raises:
        ValueError: an argument that does not fit; something else under the checkpoint's name.
    """
    bare, together = _bare(model), Together.everyone()
    folder = _folder(save, check_int("iteration", iteration, 1))
    common: dict[str, Any] = {"iteration": iteration, "world_size": together.size}
    state: dict[str, Any] = {"model": bare.sharded_state_dict(), "random": RandomState(together).sharded()}
    if optimizer is not None:
        of_optimizer = OptimizerState(optimizer, state["model"], loading=False)
        state["optimizer"], common["optimizer"] = of_optimizer.tensors, of_optimizer.plain()
    if lr_scheduler is not None:
        common["lr_scheduler"] = lr_scheduler.state_dict()
    together.first(lambda: folder.begin(overwrite=True))
    dist_checkpointing.save(state | {"common": common}, str(folder.partial))
    together.first(lambda: _publish(folder, iteration))


def load_checkpoint(model: Any, optimizer: Any, lr_scheduler: Any, load: Directory) -> int:
    """Read the latest checkpoint of a folder, in any layout of processes, and return its iteration.

    The state of random numbers comes back where there are as many processes as there were.

    Args:
        model: as of `save_checkpoint`.
        optimizer, lr_scheduler: None to leave them as they are.
        load: folder of checkpoints.

    Returns:
        The iteration; 0, and nothing is changed, where there is no checkpoint yet.

    Raises:
        ValueError: the checkpoint and the model have not the same parameters, or it lacks what is asked for. Parameters
            may then be loaded in part.
    """
    bare, tracker = _bare(model), Path(load) / TRACKER
    if not tracker.is_file():
        logger.warning("%s is not there: nothing is loaded, training starts at iteration 0", tracker)
        return 0
    folder = _folder(load, _number_in(tracker)).whole()
    common = dist_checkpointing.load_common_state_dict(str(folder))["common"]
    for name, wanted in (("optimizer", optimizer), ("lr_scheduler", lr_scheduler)):
        if wanted is not None and name not in common:
            raise ValueError(f"{folder} has no {name}: give None for it")
    numbers = RandomState(Together.everyone())
    state: dict[str, Any] = {"model": bare.sharded_state_dict()}
    if optimizer is not None:
        of_optimizer = OptimizerState(optimizer, state["model"], loading=True)
        state["optimizer"] = of_optimizer.tensors
    if common["world_size"] == numbers.together.size:
        state["random"] = numbers.sharded()
    found = _read(state, folder, may_leave=(RandomState.key, *(["optimizer."] if optimizer is None else [])))
    bare.load_state_dict(found["model"])
    if optimizer is not None:
        of_optimizer.restore(found.get("optimizer", {}), common["optimizer"])
    if lr_scheduler is not None:
        lr_scheduler.load_state_dict(common["lr_scheduler"])
    if "random" in state:
        numbers.restore(found["random"])
    return common["iteration"]


def _read(state: dict[str, Any], folder: Path, may_leave: tuple[str, ...]) -> dict[str, Any]:
    try:
        found, left, missing = dist_checkpointing.load(state, str(folder), strict=StrictHandling.RETURN_ALL)
    except CheckpointException as error:  # of PyTorch, around Megatron's
        why = dict.fromkeys(str(failure) for failure, _ in error.failures.values())
        raise ValueError(f"{folder} is not a checkpoint of this model: {'; '.join(why)}") from error
    left = {key for key in left if not key.startswith(may_leave)}
    if left or missing:
        known = (("only the checkpoint has", left), ("it lacks", missing))
        named = [f"{what} {', '.join(sorted(keys)[:5])}" for what, keys in known if keys]
        raise ValueError(f"{folder} is not a checkpoint of this model: {'; '.join(named)}")
    return found


def _bare(model: Any) -> Any:
    chunks = model if isinstance(model, list) else [model]
    if len(chunks) != 1:
        raise ValueError(f"the model must be one piece, without virtual pipeline stages, got {len(chunks)}")
    return unwrap_model(chunks[0])


def _folder(parent: Directory, iteration: int) -> CheckpointFolder:
    return CheckpointFolder.of(Path(parent) / f"iter_{iteration:07d}")


def _publish(folder: CheckpointFolder, iteration: int) -> None:
    write_document(folder.partial, {"iteration": iteration})
    folder.publish()
    tracker = folder.path.with_name(TRACKER)
    partial = tracker.with_name(f"{TRACKER}.partial")
    with partial.open("w", encoding="utf-8") as file:
        file.write(str(iteration))
        file.flush()
        os.fsync(file.fileno())
    partial.replace(tracker)
    sync_folder(tracker.parent)


def _number_in(tracker: Path) -> int:
    text = tracker.read_text(encoding="utf-8").strip()
    if not text.isdigit():
        raise ValueError(f"{tracker} must hold the number of an iteration, got {text[:50]!r}")
    return int(text)
