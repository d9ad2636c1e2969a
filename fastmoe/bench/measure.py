"""Build, check, then time all contenders of a problem in turns."""

import gc
import math
import random
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from fastmoe.bench.contenders import DENSE, LAYER, OURS, Builder
from fastmoe.bench.peers import LAYERS
from fastmoe.bench.problem import Contender, Problem, RefusedError

LIMITS = {torch.float32: 1e-5, torch.float64: 1e-12}
LIMIT_HALF = 3e-2
COPIED_BYTES = 128 << 20


@dataclass
class Times:
    """Seconds of each round, by mode; what a contender sat out is missing at the end."""

    forward: list[float] = field(default_factory=list)
    step: list[float] = field(default_factory=list)


@dataclass
class Field:
    """Who runs, how far each is from the truth, and why the others do not run."""

    contenders: dict[str, Contender]
    errors: dict[str, float]
    left_out: dict[str, str]


def gather(p: Problem, builders: dict[str, Builder]) -> Field:
    """Build every contender and run it once; whoever cannot, or is wrong, is left out with the reason."""
    found = Field({}, {}, {})
    for name, build in builders.items():
        try:
            contender = build(p)
            found.errors[name] = check(p, contender)
            found.contenders[name] = contender
        except RefusedError as reason:
            found.left_out[name] = str(reason)
        except Exception as error:  # whatever another library raises
            if name in (OURS, DENSE):
                raise
            found.left_out[name] = f"failed: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        clear(p)
    return found


def check(p: Problem, contender: Contender) -> float:
    """The largest relative error of output and gradients; 0 where the contender's mathematics is another.

    Raises:
        RefusedError: the error is above the dtype's limit, or a number is not finite.
    """
    if p.backward:
        contender.step()
    with torch.no_grad():
        y_TD = contender.forward()
    if contender.grads is None:
        if not bool(y_TD.isfinite().all()):
            raise RefusedError("wrong: its output is not finite")
        return 0.0
    got = [y_TD, *(contender.grads() if p.backward else [])]
    error = max(relative_error(g, t) for g, t in zip(got, p.truth, strict=True))
    limit = LIMITS.get(p.dtype, LIMIT_HALF)
    if not error < limit:
        raise RefusedError(f"wrong: relative error {error:.2g}, limit {limit:.2g}")
    return error


def relative_error(got: torch.Tensor, truth: torch.Tensor) -> float:
    scale = float(truth.norm())
    return float((got.double() - truth).norm()) / (scale or 1.0)


def measure(p: Problem, contenders: dict[str, Contender], rounds: int, seconds: float) -> dict[str, Times]:
    """Times of all contenders, in turns in each round; who would take more than `seconds` sits out rounds."""
    times = {name: Times() for name in contenders}
    source = torch.ones(COPIED_BYTES // 4, device=p.device)
    target = torch.empty_like(source)
    times["copy"] = Times()
    for round_number in range(rounds):
        for name in shuffled(list(contenders), round_number):
            contender, spent = contenders[name], times[name]
            if round_number and (sum(spent.forward) + sum(spent.step)) / round_number * (round_number + 1) > seconds:
                continue
            if p.device != "cpu":
                torch.cuda.empty_cache()
            with torch.no_grad():
                spent.forward.append(timed(contender.forward, p.device))
            if p.backward:
                spent.step.append(timed(contender.step, p.device))
            contender.clear()
        times["copy"].forward.append(timed(lambda: target.copy_(source), p.device))
        gc.collect()
    return times


def shuffled(names: list[str], round_number: int) -> list[str]:
    """Each round has an order of its own: who runs just before leaves the weights in cache, or does not."""
    return random.Random(round_number).sample(names, len(names))


def timed(call: Callable[[], object], device: str) -> float:
    """Seconds until the result is there."""
    if device != "cpu":
        torch.cuda.synchronize()
    start = time.perf_counter()
    result = call()
    if device != "cpu":
        torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    del result
    return seconds


def clear(p: Problem) -> None:
    for leaf in p.leaves:
        leaf.grad = None


def summarize(p: Problem, found: Field, times: dict[str, Times]) -> dict:
    """One row of the result: for each mode the floor, and each contender's median and ratios."""
    copy = statistics.median(times["copy"].forward)
    bytes_per_second = 2 * COPIED_BYTES / copy
    row: dict = {
        "shape": dict(zip("TEDHK", p.shape, strict=True)),
        "dtype": str(p.dtype).removeprefix("torch."),
        "activation": p.activation,
        "copy_gb_per_s": bytes_per_second / 1e9,
        "relative_errors": found.errors,
        "left_out": found.left_out,
        "modes": {},
    }
    for mode, attribute, passes in (("forward", "forward", 1), ("forward+backward", "step", 3)):
        runs = {name: getattr(t, attribute) for name, t in times.items() if name != "copy"}
        if not runs[OURS]:
            continue
        dense_ms = statistics.median(runs[DENSE]) * 1e3
        bytes_ms = passes * p.expert_bytes / bytes_per_second * 1e3
        floor_ms = max(dense_ms, bytes_ms)
        floor = {"floor_ms": floor_ms, "dense_ms": dense_ms, "bytes_ms": bytes_ms}
        row["modes"][mode] = floor | {"contenders": {n: figures(n, r, runs, floor_ms) for n, r in runs.items()}}
    return row


def figures(name: str, run: list[float], runs: dict[str, list[float]], floor_ms: float) -> dict:
    """A contender's times; `times_ours`: how many times ours it takes, layers beside our layer; with the quartiles."""
    ours = runs[LAYER if name in LAYERS else OURS]
    low, middle, high = ratios(run, ours)
    median_ms = statistics.median(run) * 1e3
    return {
        "median_ms": median_ms,
        "min_ms": min(run) * 1e3,
        "rounds": len(run),
        "over_floor": median_ms / floor_ms,
        "times_ours": middle,
        "spread": [low, high],
    }


def ratios(theirs: list[float], ours: list[float]) -> tuple[float, float, float]:
    """Quartiles of the rounds' ratios; the ratio of the medians thrice where one sat out rounds."""
    if len(theirs) != len(ours) or len(ours) < 2:
        ratio = statistics.median(theirs) / statistics.median(ours)
        return ratio, ratio, ratio
    each = [t / o for t, o in zip(theirs, ours, strict=True)]
    low, middle, high = statistics.quantiles(each, n=4, method="inclusive")
    assert all(map(math.isfinite, (low, middle, high)))
    return low, middle, high
