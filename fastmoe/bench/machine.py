"""What every result says about where it was measured."""

import datetime
import importlib.metadata
import platform
import subprocess
from pathlib import Path

import torch

import fastmoe

LIBRARIES = ["transformers", "deepspeed", "st-moe-pytorch", "mixture-of-experts", "scattermoe", "megablocks", "tutel"]


def machine() -> dict:
    cpu = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        cpu = next(
            (line.split(":")[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line), cpu
        )
    return {
        "cpu": cpu,
        "capability": torch.backends.cpu.get_cpu_capability(),
        "amx_bf16": "amx_bf16" in (cpuinfo.read_text() if cpuinfo.exists() else ""),
        "threads": torch.get_num_threads(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "fastmoe": fastmoe.__version__,
        "commit": _commit() or "unknown",
        "date": datetime.date.today().isoformat(),
    }


def _commit() -> str:
    command = ["git", "describe", "--always", "--dirty"]
    try:
        return subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent).stdout.strip()
    except OSError:  # no git
        return ""


def device_of(device: str) -> dict:
    if device == "cpu":
        return {}
    properties = torch.cuda.get_device_properties()
    return {
        "gpu": properties.name,
        "gpu_memory_gib": properties.total_memory / 2**30,
        "cuda": torch.version.cuda,
        "triton": _version("triton"),
        "float32_products": torch.backends.cuda.matmul.fp32_precision,
    }


def libraries() -> dict[str, str]:
    return {name: _version(name) for name in LIBRARIES}


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
