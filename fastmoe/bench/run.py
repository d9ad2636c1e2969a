"""A whole benchmark run. Needs torch alone."""

import dataclasses
import importlib.metadata
import json
import os
from collections.abc import Callable
from pathlib import Path

import torch

from fastmoe import kernels
from fastmoe.bench.contenders import choose
from fastmoe.bench.machine import machine
from fastmoe.bench.measure import gather, measure, summarize
from fastmoe.bench.memory import extra_memory, too_large
from fastmoe.bench.presets import Preset
from fastmoe.bench.problem import Problem

LIBRARIES = ["transformers", "deepspeed", "st-moe-pytorch", "mixture-of-experts", "scattermoe", "megablocks", "tutel"]


@dataclasses.dataclass(frozen=True)
class Settings:
    """`seconds`: a contender whose runs of one problem would take longer sits out the rounds past it."""

    rounds: int = 15
    seconds: float = 30.0
    memory: bool = True


def run(preset: Preset, settings: Settings, done: Callable[[dict], None]) -> dict:
    """Time every problem of a preset; `done(result)` is called after each with what there is by then.

    A problem that needs more memory than is free is in `result["skipped"]`, with the reason.

    Raises:
        ValueError: an unknown contender, dtype, activation or device.
    """
    builders = choose(preset.contenders)
    check(preset)
    result: dict = {
        "machine": machine() | _device(preset.device),
        "libraries": _versions(),
        "backends": kernels.backends(),
        "settings": dataclasses.asdict(settings) | {"preset": dataclasses.asdict(preset)},
        "rows": [],
        "skipped": [],
    }
    problems = [(shape, True) for shape in preset.shapes] + [(shape, False) for shape in preset.decode]
    for shape, backward in problems:
        for dtype in preset.dtypes:
            for activation in preset.activations:
                if reason := too_large(shape, dtype, activation, preset.device):
                    case = {"shape": dict(zip("TEDHK", shape, strict=True)), "dtype": dtype, "activation": activation}
                    result["skipped"].append(case | {"reason": reason})
                    continue
                p = Problem(shape, getattr(torch, dtype), activation, preset.device, backward)
                found = gather(p, builders)
                row = summarize(p, found, measure(p, found.contenders, settings.rounds, settings.seconds))
                del p, found
                kernels.empty_cache()
                if settings.memory and backward:
                    row["extra_mib"] = extra_memory(shape, dtype, activation, preset.device)
                result["rows"].append(row)
                done(result)
    return result


def check(preset: Preset) -> None:
    for dtype in preset.dtypes:
        found = getattr(torch, dtype, None)
        if not isinstance(found, torch.dtype) or not found.is_floating_point:
            raise ValueError(f"a dtype must be one of PyTorch's floating types, as float32; got {dtype!r}")
    for activation in preset.activations:
        kernels.get_activation(activation)
    if preset.device not in ("cpu", "cuda"):
        raise ValueError(f"device must be 'cpu' or 'cuda', got {preset.device!r}")
    if preset.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device 'cuda' is asked for and PyTorch finds none")


def save(result: dict, path: Path) -> None:
    """Write JSON, whole or not at all."""
    unfinished = path.with_suffix(".unfinished")
    unfinished.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    os.replace(unfinished, path)


def _device(device: str) -> dict:
    return {} if device == "cpu" else {"gpu": torch.cuda.get_device_name(), "cuda": torch.version.cuda}


def _versions() -> dict[str, str]:
    found = {}
    for name in LIBRARIES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found
