"""How a command's process finds its device, and how it ends among others."""

from __future__ import annotations

import os
import sys

import torch
import torch.distributed as dist


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


def own_device(name: str) -> torch.device:
    """As `find_device`, by the rank that torchrun gave the process on its machine; becomes the current one."""
    found = find_device(name, int(os.environ.get("LOCAL_RANK", "0")))
    if found.type == "cuda":
        torch.cuda.set_device(found)
    return found


def backend_of(device: torch.device) -> str:
    return "nccl" if device.type == "cuda" else "gloo"


def leave(status: int) -> None:
    """End a process among others at once; where there are no others, return.

    Python's own end would wait for exchanges that the others, dead or hanging, never answer, and threads of gloo's
    (torch 2.13) can abort, so that the status would be another.
    """
    if dist.is_initialized():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
