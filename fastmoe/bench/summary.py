"""What was measured, as one row of the result."""

import math
import statistics

from fastmoe.bench import huggingface
from fastmoe.bench.contenders import DENSE, LAYER, OURS
from fastmoe.bench.gate import Field
from fastmoe.bench.graphs import in_graph_name
from fastmoe.bench.measure import COPY, MATMUL, Times, copied_bytes, matmul_size
from fastmoe.bench.peers import LAYERS
from fastmoe.bench.problem import Problem


def summarize(p: Problem, found: Field, times: dict[str, Times]) -> dict:
    """For each mode the floor, and each contender's median and ratios."""
    bytes_per_second = 2 * copied_bytes(p.device) / statistics.median(times[COPY].forward)
    matmul_flops = 2 * matmul_size(p.device) ** 3 / statistics.median(times[MATMUL].forward)
    row: dict = {
        "shape": dict(zip("TEDHK", p.shape, strict=True)),
        "dtype": str(p.dtype).removeprefix("torch."),
        "activation": p.activation,
        "copy_gb_per_s": bytes_per_second / 1e9,
        "matmul_tflops": matmul_flops / 1e12,
        "relative_errors": found.errors,
        "left_out": found.left_out,
        "modes": {},
    }
    for mode, attribute, passes in (("forward", "forward", 1), ("forward+backward", "step", 3)):
        runs = {name: getattr(t, attribute) for name, t in times.items() if name not in (COPY, MATMUL)}
        if not runs[OURS]:
            continue
        dense_ms = statistics.median(runs[DENSE]) * 1e3
        bytes_ms = passes * p.expert_bytes / bytes_per_second * 1e3
        floor = {
            "floor_ms": max(dense_ms, bytes_ms),
            "dense_ms": dense_ms,
            "bytes_ms": bytes_ms,
            "flops": passes * p.flops,
            "matmul_ms": passes * p.flops / matmul_flops * 1e3,
        }
        row["modes"][mode] = floor | {"contenders": {n: figures(n, r, runs, floor) for n, r in runs.items()}}
    return row


def figures(name: str, run: list[float], runs: dict[str, list[float]], floor: dict) -> dict:
    """A contender's times; `times_ours`: how many times ours it takes, with the quartiles.

    Layers stand beside our layer, a CUDA graph beside ours, an implementation of transformers beside ours there, where
    that runs. `of_matmul`: the part of the machine's own rate of large products that it reaches; operations of the two
    products alone count.
    """
    low, middle, high = ratios(run, runs[_ours(name, runs)])
    median_ms = statistics.median(run) * 1e3
    return {
        "median_ms": median_ms,
        "min_ms": min(run) * 1e3,
        "rounds": len(run),
        "over_floor": median_ms / floor["floor_ms"],
        "over_dense": median_ms / floor["dense_ms"],
        "over_bytes": median_ms / floor["bytes_ms"],
        "tflops": floor["flops"] / median_ms / 1e9,
        "of_matmul": floor["matmul_ms"] / median_ms,
        "times_ours": middle,
        "spread": [low, high],
    }


def _ours(name: str, runs: dict[str, list[float]]) -> str:
    graph = in_graph_name(OURS)
    if name.endswith(in_graph_name("")) and graph in runs:
        return graph
    if name in huggingface.THEIRS and huggingface.OURS in runs:
        return huggingface.OURS
    return LAYER if name in LAYERS else OURS


def ratios(theirs: list[float], ours: list[float]) -> tuple[float, float, float]:
    """Quartiles of the rounds' ratios; the ratio of the medians thrice where one sat out rounds."""
    if len(theirs) != len(ours) or len(ours) < 2:
        ratio = statistics.median(theirs) / statistics.median(ours)
        return ratio, ratio, ratio
    each = [t / o for t, o in zip(theirs, ours, strict=True)]
    low, middle, high = statistics.quantiles(each, n=4, method="inclusive")
    assert all(map(math.isfinite, (low, middle, high)))
    return low, middle, high
