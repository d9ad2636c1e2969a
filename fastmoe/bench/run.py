"""A whole benchmark run. Needs torch alone."""

import dataclasses
import gc
import json
import os
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import torch

from fastmoe import kernels
from fastmoe.bench import huggingface
from fastmoe.bench.contenders import OURS, Builder, choose
from fastmoe.bench.gate import gather
from fastmoe.bench.kept import memory_of
from fastmoe.bench.machine import device_of, libraries, machine
from fastmoe.bench.measure import measure
from fastmoe.bench.memory import extra_memory, too_large
from fastmoe.bench.presets import Preset, Shape
from fastmoe.bench.problem import Problem
from fastmoe.bench.summary import summarize

KEEPERS = (OURS, "F.grouped_mm", "HF grouped_mm", huggingface.OURS)  # whose kept memory is counted


@dataclasses.dataclass(frozen=True)
class Settings:
    """How to run.

    Attributes:
        rounds: how many times each contender runs.
        seconds: a contender whose runs of one problem would take longer sits out the rounds past it.
        memory: measure memory too.
        budget: seconds of the whole run, None for no end; once they are spent no other problem is begun.
        go_on: a problem that fails is named and the next one begun.
        dry: a rehearsal, no measurement.
    """

    rounds: int = 15
    seconds: float = 30.0
    memory: bool = True
    budget: float | None = None
    go_on: bool = False
    dry: bool = False


@dataclasses.dataclass(frozen=True)
class Case:
    """One problem of a run; without backward it is decoding."""

    shape: Shape
    dtype: str
    activation: str
    backward: bool

    def named(self) -> dict:
        return dataclasses.asdict(self) | {"shape": dict(zip("TEDHK", self.shape, strict=True))}


def run(preset: Preset, settings: Settings, done: Callable[[dict], None]) -> dict:
    """Time every problem of a preset; `done(result)` is called after each with what there is by then.

    A problem that needs more memory than is free is in `result["skipped"]`, one that fails in `result["failed"]`, with
    the reason; those not begun are in `result["left"]`.

    Raises:
        ValueError: an unknown contender, dtype, activation or device.
    """
    start = time.monotonic()
    builders = choose(preset.contenders)
    check(preset)
    cases = all_cases(preset)
    result = _head(preset, settings) | {"rows": [], "skipped": [], "failed": [], "left": [c.named() for c in cases]}
    for case in cases:
        if settings.budget is not None and time.monotonic() - start >= settings.budget:
            break
        result["left"].pop(0)
        free_memory(preset.device)
        if reason := too_large(case.shape, case.dtype, case.activation, preset.device):
            result["skipped"].append(case.named() | {"reason": reason})
            continue
        try:
            result["rows"].append(one_row(case, preset.device, builders, settings))
        except Exception as error:
            if not settings.go_on:
                raise
            reason = f"{type(error).__name__}: {error}"
            result["failed"].append(case.named() | {"reason": reason, "traceback": traceback.format_exc()})
        done(result)
    return result


def one_row(case: Case, device: str, builders: dict[str, Builder], settings: Settings) -> dict:
    p = Problem(case.shape, getattr(torch, case.dtype), case.activation, device, case.backward)
    found = gather(p, builders)
    del p.truth  # as large as the weights
    row = summarize(p, found, measure(p, found.contenders, settings.rounds, settings.seconds))
    if settings.memory and case.backward:
        row["memory"] = {name: memory_of(p, c) for name, c in found.contenders.items() if name in KEEPERS}
        del p, found
        free_memory(device)
        if device == "cpu" and not settings.dry:
            row["extra_mib"] = extra_memory(case.shape, case.dtype, case.activation)
    return row


def all_cases(preset: Preset) -> list[Case]:
    problems = [(shape, True) for shape in preset.shapes] + [(shape, False) for shape in preset.decode]
    return [
        Case(shape, dtype, activation, backward)
        for shape, backward in problems
        for dtype in preset.dtypes
        for activation in preset.activations
    ]


def free_memory(device: str) -> None:
    kernels.empty_cache()
    if device != "cpu":
        gc.collect()
        torch.cuda.empty_cache()


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


def _head(preset: Preset, settings: Settings) -> dict:
    return {
        "dry": settings.dry,
        "machine": machine() | device_of(preset.device),
        "libraries": libraries(),
        "backends": kernels.backends(),
        "settings": dataclasses.asdict(settings) | {"preset": dataclasses.asdict(preset)},
    }
