"""From FastMoE's words for parallelism, a world size and a group, to the processes that they mean."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

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


class GroupAttribute:
    """A module's attribute for a process group or None; deep copies of the module share the group."""

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = f"_{name}"

    def __get__(self, module: Any, owner: type | None = None) -> "ProcessGroup | None":
        return module.__dict__[self.name].group

    def __set__(self, module: Any, group: "ProcessGroup | None") -> None:
        module.__dict__[self.name] = _Shared(group)


@dataclass(frozen=True)
class _Shared:
    group: "ProcessGroup | None"

    def __deepcopy__(self, memo: dict[int, Any]) -> "_Shared":
        return self
