"""The processes of a check: those that torchrun started, or this one."""

from __future__ import annotations

import os

import torch
import torch.distributed as dist

from fastmoe.parallel.process import backend_of, leave, own_device


def world_size() -> int:
    """How many processes torchrun started; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def join(device: str) -> torch.device:
    """Set up the default process group, and say which device is this process's.

    Args:
        device: auto, cpu or cuda.

    Raises:
        ValueError: there is no GPU.
    """
    found = own_device(device)
    backend = backend_of(found)
    if world_size() > 1:
        dist.init_process_group(backend)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    return found


def end(status: int) -> None:
    """`leave` where there are other processes; alone, give up the process group and return."""
    if dist.is_initialized() and dist.get_world_size() == 1:
        dist.destroy_process_group()
    leave(status)
