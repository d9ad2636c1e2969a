"""FastMoE's helpers around process groups."""

from typing import TYPE_CHECKING

import torch.distributed as dist

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def get_torch_default_comm() -> "ProcessGroup":
    """The group of all processes.

    Raises:
        RuntimeError: `torch.distributed` is not set up.
    """
    group = dist.group.WORLD if dist.is_available() and dist.is_initialized() else None
    if group is None:
        raise RuntimeError("there is no group of all processes: call torch.distributed.init_process_group before")
    return group


def get_rank_0_in_comm(comm: "ProcessGroup | None") -> int:
    """The rank, among all processes, of the first one of a group; None means all."""
    return 0 if comm is None else dist.get_global_rank(comm, 0)
