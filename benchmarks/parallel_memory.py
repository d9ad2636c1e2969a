"""Worker of benchmarks/parallel.py: the memory of one process while the model grows with their number."""

from pathlib import Path

import torch
import torch.distributed as dist
from parallel_launch import answer
from parallel_probe import gather
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

import fastmoe

STEPS = 3


def memory(job: dict) -> dict:
    size, D = dist.get_world_size(), job["d_model"]
    E = job["experts"] * size
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    with torch.device("meta"):
        moe = fastmoe.MoE(D, E, job["top_k"], d_hidden=job["d_hidden"])
        model = nn.Sequential(nn.Linear(D, D), moe, nn.Linear(D, D))
    whole = sum(p.numel() for p in model.parameters())
    fastmoe.parallelize(model, init_device_mesh("cpu", (size,), mesh_dim_names=("ep",)))
    fastmoe.materialize(model, "cpu")
    optimizer = torch.optim.AdamW(model.parameters())
    torch.manual_seed(1 + dist.get_rank())
    x = torch.randn(job["tokens"], D)
    for _ in range(STEPS):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
    peaks = gather([float(resident("VmHWM") - before)]).flatten().tolist()
    return {
        "experts": E,
        "parameters": whole,
        "parameters_here": sum(p.numel() for p in model.parameters()),
        "peak_mib": [peak / 1024 for peak in peaks],
    }


def resident(name: str) -> int:
    """KiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


if __name__ == "__main__":
    answer(memory)
