"""The processes of a run: one, or those that torchrun started."""

from __future__ import annotations

import os
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from fastmoe._processes import Processes, collective
from fastmoe.parallel.checkpoint_together import Together
from fastmoe.parallel.process import backend_of, find_device, leave, own_device
from fastmoe.train.config import ParallelConfig
from fastmoe.train.failure import during
from fastmoe.train.rendezvous import meet

DATA_PARALLEL = ParallelConfig()


@dataclass(frozen=True)
class World:
    """This process among `size`; `mesh` has dimensions dp and ep, and is None where the process is alone."""

    device: torch.device
    rank: int = 0
    size: int = 1
    mesh: DeviceMesh | None = None

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def group(self) -> dist.ProcessGroup | None:
        """All processes of the run."""
        return None if self.mesh is None else dist.group.WORLD

    @property
    def together(self) -> Together:
        return Together(self.group, self.rank, self.size)

    def sum(self, x: Tensor) -> Tensor:
        """`x` summed over all processes."""
        return Processes(self.group, self.rank, self.size).sum(x)

    def any(self, flag: bool) -> bool:
        """Whether the flag is up on any process; all get the same answer."""
        if self.group is None:
            return flag
        return bool(self.sum(torch.tensor(float(flag), device=self.device)) > 0)

    def barrier(self) -> None:
        """Wait for all processes. Do so before leaving: gloo (torch 2.13) can abort a process that leaves early."""
        if self.group is not None:
            with collective():
                dist.barrier(self.group)


@contextmanager
def open_world(device: str, parallel: ParallelConfig = DATA_PARALLEL) -> Iterator[World]:
    """Join the process group that torchrun described in the environment, if it did, and leave it if all goes well.

    Raises:
        ValueError: a device that is not there, or an ep that does not divide the number of processes.
        RunError: the others did not come.
    """
    size = int(os.environ["WORLD_SIZE"]) if "RANK" in os.environ and "WORLD_SIZE" in os.environ else None
    if (size or 1) % parallel.ep:
        raise ValueError(
            f"ep must divide the number of processes; got ep={parallel.ep} and {size or 1}: "
            "start as many as you want with torchrun --nproc-per-node"
        )
    if size is None:
        yield World(find_device(device, local_rank=0))
        return
    found = own_device(device)
    with during("joining the other processes"):
        mesh = join(found, parallel)
    yield World(found, dist.get_rank(), size, mesh)
    dist.destroy_process_group()


def join(device: torch.device, parallel: ParallelConfig) -> DeviceMesh:
    timeout = timedelta(seconds=parallel.timeout)
    store, rank, size = meet(timeout)
    dist.init_process_group(backend_of(device), store=store, rank=rank, world_size=size, timeout=timeout)
    return init_device_mesh(device.type, (size // parallel.ep, parallel.ep), mesh_dim_names=("dp", "ep"))


@contextmanager
def leaving_when_it_fails() -> Iterator[None]:
    """What nobody catches inside is printed, and ends a process among others at once; see `leave`."""
    try:
        yield
    except BaseException:
        if dist.is_initialized():
            traceback.print_exc()
            leave(1)
        raise
