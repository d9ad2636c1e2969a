"""From FastMoE's words for parallelism, a world size and a group, to the processes that they mean."""

from typing import TYPE_CHECKING

from fastmoe._processes import ALONE, Processes

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def workers(world_size: int, group: "ProcessGroup | None" = None) -> Processes:
    """The workers of a group; all processes if it is None.

    Raises:
        ValueError: the group has another number of processes, or `torch.distributed` is not set up.
    """
    if world_size == 1:
        return ALONE
    processes = Processes.of(group)
    if processes.size != world_size:
        raise ValueError(
            f"world_size={world_size} workers hold different experts, but "
            f"{'moe_group has' if group is not None else 'there are'} {processes.size} process(es): give moe_group a "
            f"group of {world_size}, set up by torch.distributed.init_process_group"
        )
    return processes
