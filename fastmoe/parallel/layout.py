"""`Layout`: the dimensions of a DeviceMesh, and the groups of processes that they stand for."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from fastmoe._errors import check_choice
from fastmoe._processes import Processes

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh

DIMENSIONS = ("dp", "ep", "tp")
TENSOR_PARALLEL = ("hidden", "slice")


@dataclass(frozen=True)
class Layout:
    """Who holds what.

    Attributes:
        mesh: of dimensions named from dp, ep, tp, in this order.
        tp: "hidden": the processes of a tp group hold the same tokens, and each a part of every expert's hidden width;
            "slice": they hold the same tokens, each routes a slice of them, and experts are spread over ep and tp.
    """

    mesh: DeviceMesh
    tp: str = "hidden"

    def __post_init__(self) -> None:
        names = self.mesh.mesh_dim_names or ()
        expected = tuple(name for name in DIMENSIONS if name in names)
        if not names or names != expected:
            raise ValueError(
                f"the mesh must have dimensions named from dp, ep, tp, in this order; got {names or 'no names'}: "
                "init_device_mesh(device_type, shape, mesh_dim_names=...)"
            )
        check_choice("tp", self.tp, TENSOR_PARALLEL)
        ranks = self.mesh.mesh.flatten().tolist()
        if ranks != sorted(ranks):
            raise ValueError(f"the mesh must have its processes in ascending order, got {ranks}")
        if self.mesh.get_coordinate() is None:
            raise ValueError(f"process {dist.get_rank()} is not in the mesh {self.mesh}")

    def __str__(self) -> str:
        sizes = zip(self.mesh.mesh_dim_names or (), self.mesh.shape, strict=True)
        return ", ".join(f"{name}={size}" for name, size in sizes)

    def size(self, name: str) -> int:
        """Processes along a dimension; 1 where the mesh has none of that name."""
        names = self.mesh.mesh_dim_names or ()
        return self.mesh.size(names.index(name)) if name in names else 1

    def over(self, *names: str) -> DeviceMesh | None:
        """The mesh of one dimension over these of its dimensions; None where it has none of them."""
        found = tuple(name for name in names if name in (self.mesh.mesh_dim_names or ()))
        if not found:
            return None
        part = self.mesh[found]
        one = part if len(found) == 1 else part._flatten("_".join(found))
        inherit_timeout(one.get_group(), torch.device(one.device_type))
        return one

    @cached_property
    def everyone(self) -> DeviceMesh:
        """All processes of the mesh."""
        found = self.over(*DIMENSIONS)
        assert found is not None
        return found

    @cached_property
    def replicas(self) -> DeviceMesh | None:
        """Processes that hold the same experts."""
        return self.over("dp")

    @cached_property
    def experts(self) -> DeviceMesh | None:
        """Processes that the experts are spread over."""
        return self.over("ep", "tp") if self.tp == "slice" else self.over("ep")

    @cached_property
    def batch(self) -> DeviceMesh | None:
        """Processes whose batches make up the whole batch."""
        return self.everyone if self.tp == "slice" else self.over("dp", "ep")

    def __deepcopy__(self, memo: dict[int, Any]) -> Layout:
        """Itself: process groups cannot be copied."""
        return self

    @cached_property
    def batch_group(self) -> ProcessGroup:
        """As `batch`, as a process group; one of this process alone where the mesh has no such dimension."""
        if self.batch is not None:
            return self.batch.get_group()
        return dist.new_group([dist.get_rank()], use_local_synchronization=True)

    @cached_property
    def same_tokens(self) -> DeviceMesh | None:
        """Processes that hold the same tokens."""
        return self.over("tp")


def inherit_timeout(group: ProcessGroup, device: torch.device) -> None:
    """Give a group the default group's timeout where it has PyTorch's own, as the groups of a mesh do."""
    from torch.distributed.distributed_c10d import _get_default_timeout

    assert dist.group.WORLD is not None
    own, given = (getattr(g._get_backend(device), "options", None) for g in (group, dist.group.WORLD))
    if own is not None and given is not None and own._timeout == _get_default_timeout(dist.get_backend(group)):
        group.set_timeout(given._timeout)


def processes_of(mesh: DeviceMesh | None, layer: str | None = None) -> Processes:
    """The processes of a mesh of one dimension, for a layer perhaps; those of None are this one alone."""
    found = Processes() if mesh is None else Processes.of(mesh.get_group())
    return found if layer is None else replace(found, place=f"MoE layer {layer!r}")
