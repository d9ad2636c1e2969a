"""What `--monitor` costs a training step on the CPU: target, under 2%.

    python benchmarks/monitor_cpu.py      # writes benchmarks/results/monitor_cpu.json

The model of `fastmoe train --preset demo`: one model, one optimizer. Steps come in pairs, one with the monitor attached
and one without, which of them first changing from pair to pair; the snapshot of every 10th pair is timed with its step.
Figures are medians, the overhead the median of the pairs' ratios; the snapshot's share is its median over 10 steps.
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import torch

import fastmoe
from fastmoe.bench.machine import machine
from fastmoe.train.corpus import load_corpus
from fastmoe.train.options import preset
from fastmoe.train.trainer import Trainer
from fastmoe.train.world import World

SNAPSHOT_EVERY = 10
TARGET = 0.02


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=400)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "monitor_cpu.json")
    args = parser.parse_args()
    trainer = Trainer(preset("demo"), "moe", load_corpus(None), World(torch.device("cpu")))
    monitor = fastmoe.LoadMonitor(trainer.model)
    monitor.close()
    for _ in range(10):
        trainer.take_step()
    seconds: dict[bool, list[float]] = {True: [], False: []}
    snapshots = []
    for pair in range(args.pairs):
        for watched in (True, False) if pair % 2 else (False, True):
            attach(monitor, watched)
            start = time.perf_counter()
            trainer.take_step()
            seconds[watched].append(time.perf_counter() - start)
        if pair % SNAPSHOT_EVERY == 0:
            start = time.perf_counter()
            monitor.snapshot()
            snapshots.append(time.perf_counter() - start)
    plain = statistics.median(seconds[False])
    counting = statistics.median(a / b for a, b in zip(seconds[True], seconds[False], strict=True)) - 1
    reading = statistics.median(snapshots) / SNAPSHOT_EVERY / plain
    result = {
        "machine": machine(),
        "pairs": args.pairs,
        "median_step_ms": plain * 1e3,
        "median_watched_step_ms": statistics.median(seconds[True]) * 1e3,
        "counting_overhead": counting,
        "snapshot_ms": statistics.median(snapshots) * 1e3,
        "snapshot_every": SNAPSHOT_EVERY,
        "snapshot_overhead": reading,
        "overhead": counting + reading,
        "target": TARGET,
    }
    args.out.write_text(json.dumps(result, indent=1) + "\n")
    print(f"step {plain * 1e3:.2f} ms; counting {counting:+.2%}, snapshots {reading:+.2%}: {counting + reading:+.2%}")
    print("within the target" if counting + reading < TARGET else f"over the target of {TARGET:.0%}")


def attach(monitor: fastmoe.LoadMonitor, watched: bool) -> None:
    for name, layer in monitor.layers.items():
        layer.observers[:] = [monitor.counters[name]] if watched else []


if __name__ == "__main__":
    main()
