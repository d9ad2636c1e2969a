"""The processes of a run: one, or those that torchrun started."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class World:
    """This process among `size`; `group` is None where it is alone."""

    device: torch.device
    rank: int = 0
    size: int = 1
    group: dist.ProcessGroup | None = None

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def sum(self, x: Tensor) -> Tensor:
        """`x` summed over all processes."""
        if self.group is None:
            return x
        x = x.clone()
        dist.all_reduce(x, group=self.group)
        return x

    def any(self, flag: bool) -> bool:
        """Whether the flag is up on any process; all get the same answer."""
        if self.group is None:
            return flag
        return bool(self.sum(torch.tensor(float(flag), device=self.device)) > 0)

    def barrier(self) -> None:
        """Wait for all processes. Do so before leaving: gloo (torch 2.13) can abort a process that leaves early."""
        if self.group is not None:
            dist.barrier(self.group)


@contextmanager
def open_world(device: str) -> Iterator[World]:
    """Join the process group that torchrun described in the environment, if it did."""
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        yield World(find_device(device, local_rank=0))
        return
    found = find_device(device, int(os.environ.get("LOCAL_RANK", "0")))
    if found.type == "cuda":
        torch.cuda.set_device(found)
    dist.init_process_group("nccl" if found.type == "cuda" else "gloo")
    try:
        yield World(found, dist.get_rank(), dist.get_world_size(), dist.group.WORLD)
    finally:
        dist.destroy_process_group()


def find_device(name: str, local_rank: int) -> torch.device:
    """auto and cuda take one GPU per process."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"device must be auto, cpu, cuda or cuda:N; got {name!r}") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device {name!r} was asked for; this PyTorch finds no GPU")
    return torch.device("cuda", local_rank) if name == "cuda" else device
