"""Times of all contenders of a problem, in turns."""

import gc
import random
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from fastmoe.bench.problem import Contender, Problem

Call = Callable[[], object]
COPY, MATMUL = "copy", "matmul"
_FLUSH_BYTES = 256 << 20  # more than any L2
_LONG, _ENOUGH, _MOST = 0.5, 0.02, 50  # seconds of a call that is timed once; seconds and calls of one that is repeated


@dataclass
class Times:
    """Seconds of each round, by mode; what a contender sat out is missing at the end."""

    forward: list[float] = field(default_factory=list)
    step: list[float] = field(default_factory=list)


def copied_bytes(device: str) -> int:
    return (128 << 20) if device == "cpu" else (1 << 30)


def matmul_size(device: str) -> int:
    return 512 if device == "cpu" else 8192


def measure(p: Problem, contenders: dict[str, Contender], rounds: int, seconds: float) -> dict[str, Times]:
    """Times of all contenders, in turns in each round; who would take more than `seconds` sits out rounds.

    Beside them the machine's own rates: a large copy, and one square matrix product in the problem's dtype.
    """
    times = {name: Times() for name in (*contenders, COPY, MATMUL)}
    rates = yardsticks(p)
    flush = None if p.device == "cpu" or p.backward else flusher(p.device)
    for round_number in range(rounds):
        for name in shuffled(list(contenders), round_number):
            contender, spent = contenders[name], times[name]
            if round_number and (sum(spent.forward) + sum(spent.step)) / round_number * (round_number + 1) > seconds:
                continue
            if p.device != "cpu":
                torch.cuda.empty_cache()
            with torch.no_grad():
                spent.forward.append(timed(contender.forward, p.device, flush, not contender.replayed))
            if p.backward:
                spent.step.append(timed(contender.step, p.device))
            contender.clear()
        for name, call in rates.items():
            times[name].forward.append(timed(call, p.device))
        gc.collect()
    return times


def yardsticks(p: Problem) -> dict[str, Call]:
    source = torch.ones(copied_bytes(p.device) // 4, device=p.device)
    target = torch.empty_like(source)
    a, b = (torch.randn((matmul_size(p.device),) * 2, device=p.device).to(p.dtype) for _ in range(2))
    return {COPY: lambda: target.copy_(source), MATMUL: lambda: a @ b}


def flusher(device: str) -> Call:
    """Reads more than L2 holds, so that weights come from memory; it leaves nothing to be written back."""
    return torch.ones(_FLUSH_BYTES // 4, device=device).sum


def shuffled(names: list[str], round_number: int) -> list[str]:
    """Each round has an order of its own: who runs just before leaves the weights in cache, or does not."""
    return random.Random(round_number).sample(names, len(names))


def timed(call: Call, device: str, flush: Call | None = None, wait: bool = True) -> float:
    """Seconds until the result is there.

    On a GPU a first call warms up, then calls in a row are timed together, or one by one behind a `flush` of L2. With
    `wait` the device is idle when such a call begins, so that the host's launches count.
    """
    if device == "cpu":
        start = time.perf_counter()
        result = call()
        seconds = time.perf_counter() - start
        del result
        return seconds
    first = _on_gpu(call, 1)
    if first > _LONG:
        return first
    repeats = max(1, min(_MOST, int(_ENOUGH / max(first, 1e-9))))
    if flush is None:
        return _on_gpu(call, repeats)
    return statistics.median(_on_gpu(call, 1, flush, wait) for _ in range(repeats))


def _on_gpu(call: Call, repeats: int, flush: Call | None = None, wait: bool = True) -> float:
    """Seconds of one of `repeats` calls in a row."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    if flush is not None:
        flush()
    if wait:
        torch.cuda.synchronize()
    start.record()
    for _ in range(repeats):
        call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3 / repeats
