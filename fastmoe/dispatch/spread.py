"""`Spread`: which experts live on which process."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from fastmoe._processes import Processes

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


@dataclass(frozen=True)
class Spread:
    """E experts over P processes, in order, `ceil(E / P)` on each as long as they last: DTensor's `Shard(0)`.

    Attributes:
        num_experts: E.
        processes: P of them.
        mesh: the same processes, as a DeviceMesh of one dimension, where there is one.
    """

    num_experts: int
    processes: Processes
    mesh: "DeviceMesh | None" = None

    def held_by(self, rank: int) -> range:
        """The numbers of the experts on a process."""
        each = -(-self.num_experts // self.processes.size)
        return range(min(rank * each, self.num_experts), min((rank + 1) * each, self.num_experts))

    @property
    def held(self) -> range:
        """The numbers of the experts on this process."""
        return self.held_by(self.processes.rank)

    @property
    def sizes_P(self) -> list[int]:
        """How many experts each process holds."""
        return [len(self.held_by(rank)) for rank in range(self.processes.size)]
