"""What fits, and on a CPU what a pass takes on top of weights and gradients, each contender in its own process."""

import ast
import ctypes
import subprocess
import sys
from pathlib import Path

import torch

from fastmoe.bench.contenders import DENSE, OURS, table
from fastmoe.bench.problem import Problem
from fastmoe.bench.truth import CHUNK_BYTES
from fastmoe.kernels import get_activation

Shape = tuple[int, int, int, int, int]


def too_large(shape: Shape, dtype: str, activation: str, device: str) -> str | None:
    """The reason why this machine has not the memory for a problem with all its contenders; None if it has."""
    T, E, D, H, K = shape
    size = getattr(torch, dtype).itemsize
    weights = E * D * H * (3 if get_activation(activation).gated else 2)
    rows = T * K * (D + 3 * H)
    # Weights, gradients, and on a CPU buffers kept for them and weights of other libraries' own; the truth, in float32.
    held = weights * ((8 if device == "cpu" else 3) * size + max(4, size)) + rows * 8 * size
    in_float64 = min(6 * CHUNK_BYTES, 48 * (weights + rows))
    needed = held + in_float64
    free = free_bytes(device)
    if free is None or needed <= free:
        return None
    return f"it needs some {needed / 2**30:.1f} GiB of memory, and {free / 2**30:.1f} GiB are free"


def free_bytes(device: str) -> int | None:
    """Free memory of the device; None where the system does not tell."""
    if device != "cpu":
        return torch.cuda.mem_get_info()[0]
    meminfo = Path("/proc/meminfo")
    lines = meminfo.read_text().splitlines() if meminfo.exists() else []
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), None)


def extra_memory(shape: Shape, dtype: str, activation: str) -> dict[str, float] | None:
    """Peak MiB on a CPU of ours and of the dense MLP on T*K rows; None where the system does not tell."""
    if not (Path("/proc/self/clear_refs").exists() and hasattr(ctypes.CDLL(None), "malloc_trim")):
        return None
    found = {}
    for name in (OURS, DENSE):
        arguments = (name, shape, dtype, activation)
        code = f"from fastmoe.bench.memory import _measure; _measure{arguments!r}"
        run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        found[name] = ast.literal_eval(run.stdout.splitlines()[-1]) / 2**20
    return found


def _measure(name: str, shape: Shape, dtype: str, activation: str) -> None:
    _step(name, (4, 2, 64, 64, 2), dtype, activation)  # what a library takes once does not count
    p = Problem(shape, getattr(torch, dtype), activation)
    contender = table()[name](p)
    before = _reset_peak()
    contender.step()
    grads = sum(leaf.grad.nbytes for leaf in contender.leaves if leaf.grad is not None)
    print(_status("VmHWM") - before - grads)


def _step(name: str, shape: Shape, dtype: str, activation: str) -> None:
    table()[name](Problem(shape, getattr(torch, dtype), activation)).step()


def _reset_peak() -> int:
    """Forget the peak; the bytes in use now."""
    ctypes.CDLL(None).malloc_trim(0)  # freed memory that stays resident would serve the step uncounted
    Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def _status(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {key}")
