"""The processes of a check: those that torchrun started, or this one."""

from __future__ import annotations

import os
import sys

import torch
import torch.distributed as dist


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
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device 'cuda' was asked for; this PyTorch finds no GPU")
    found = torch.device("cpu")
    if device != "cpu" and torch.cuda.is_available():
        found = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(found)
    backend = "nccl" if found.type == "cuda" else "gloo"
    if world_size() > 1:
        dist.init_process_group(backend)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    return found


def leave(status: int) -> None:
    """End at once where there are other processes; alone, give up the process group and return.

    At Python's own end NCCL can wait for processes that are not there any more, and threads of gloo's (torch 2.13) can
    abort, so that the status would be another.
    """
    if not dist.is_initialized():
        return
    if dist.get_world_size() == 1:
        dist.destroy_process_group()
        return
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
