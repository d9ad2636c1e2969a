"""Every router on the same training run: a small byte-level GPT, the same data and seed, equal FLOPs per token.

    python benchmarks/routers.py --data tinyshakespeare.txt   # writes benchmarks/results/routers.json and the pictures
    python benchmarks/render.py                               # then the table of docs/routers.md

One process; all models take step i before any takes step i + 1, in an order that rotates, so that what slows the
machine down slows all. Time per step is the median, relative to `topk` the median of the steps' ratios. The load is
that of the last `--window` steps, mean over layers; the loss that of the held-out text.
"""

import argparse
import json
import re
import statistics
import time
from pathlib import Path

import torch
from rich.progress import track

import fastmoe
from fastmoe.bench.machine import machine
from fastmoe.monitor.sinks.png import HeatMapPng
from fastmoe.train.config import DataConfig, ModelConfig, MoEConfig, OptimConfig, RunConfig, TrainConfig
from fastmoe.train.corpus import load_corpus
from fastmoe.train.trainer import Trainer
from fastmoe.train.world import World

HERE = Path(__file__).parent
IMAGES = HERE.parent / "docs" / "images" / "routers"
BLOCK, EXPERTS = 128, 8
# label: router, top_k, options
CONTENDERS: dict[str, tuple[str, int, dict]] = {
    "topk": ("topk", 2, {}),
    "topk, K = 1": ("topk", 1, {}),
    "topk, no balance loss": ("topk", 2, {"aux_loss_weight": 0.0}),
    "noisy_topk": ("noisy_topk", 2, {}),
    "gshard": ("gshard", 2, {}),
    "switch": ("switch", 1, {}),
    "expert_choice": ("expert_choice", 2, {}),
    "base": ("base", 1, {}),
    "sinkhorn": ("sinkhorn", 2, {}),
    "loss_free": ("loss_free", 2, {}),
    "hash": ("hash", 2, {}),
    "soft": ("soft", 2, {"slots_per_expert": 2 * BLOCK // EXPERTS}),
    "swipe": ("swipe", 2, {}),
    "random": ("random", 2, {}),
    "round_robin": ("round_robin", 2, {}),
    "zero": ("zero", 2, {}),
}


def config(label: str, data: Path | None, steps: int) -> TrainConfig:
    router, top_k, options = CONTENDERS[label]
    return TrainConfig(
        model=ModelConfig(block_size=BLOCK, n_layer=4, n_head=4, d_model=128),
        moe=MoEConfig(num_experts=EXPERTS, top_k=top_k, router=router, router_options=options),
        data=DataConfig(path=data, eval_sequences=128),
        optim=OptimConfig(steps=steps, batch_size=8, lr=3e-3, min_lr=3e-4, warmup_steps=min(60, steps // 2)),
        run=RunConfig(out=Path("unused"), device="cpu"),
    )


def train(trainers: dict[str, Trainer], steps: int, window: int) -> tuple[dict, dict, dict]:
    """Seconds of every step, the load of the last `window` steps and a heat map's records, each by label."""
    seconds: dict[str, list[float]] = {label: [] for label in trainers}
    monitors = {label: fastmoe.LoadMonitor(trainer.model) for label, trainer in trainers.items()}
    maps = {label: HeatMapPng(IMAGES / (re.sub(r"\W+", "_", label) + ".png")) for label in trainers}
    loads = {}
    order = list(trainers)
    every = max(1, steps // 50)
    for step in track(range(steps), description="steps"):
        order = order[1:] + order[:1]
        for label in order:
            start = time.perf_counter()
            trainers[label].take_step()
            seconds[label].append(time.perf_counter() - start)
        for label, monitor in monitors.items():
            if step + 1 == steps:
                loads[label] = monitor.snapshot()
            elif step + 1 == steps - window:
                monitor.snapshot()
            elif (step + 1) % every == 0 and step + 1 < steps - window:
                maps[label].write(step + 1, monitor.snapshot())
    for label in trainers:
        maps[label].write(steps, loads[label])
    return seconds, loads, maps


def mean(values) -> float:
    return statistics.fmean(list(values))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="text to learn; the standard library's source if left out")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--window", type=int, default=100)
    parser.add_argument("--routers", nargs="*", choices=list(CONTENDERS), default=list(CONTENDERS))
    parser.add_argument("--out", type=Path, default=HERE / "results" / "routers.json")
    args = parser.parse_args()
    labels = list(dict.fromkeys(["topk", *args.routers]))
    where = machine()  # before the pictures change the checkout
    corpus, world = load_corpus(args.data), World(torch.device("cpu"))
    trainers = {label: Trainer(config(label, args.data, args.steps), "moe", corpus, world) for label in labels}
    seconds, loads, maps = train(trainers, args.steps, min(args.window, args.steps))
    rows = {}
    for label, trainer in trainers.items():
        router, top_k, options = CONTENDERS[label]
        trainer.flush()
        layers = loads[label].values()
        counted = seconds[label][len(seconds[label]) // 10 :]
        reference = seconds["topk"][len(seconds["topk"]) // 10 :]
        rows[label] = {
            "router": router,
            "top_k": top_k,
            "options": options,
            "causal": all(layer.router.causal for layer in fastmoe.moe_layers(trainer.model).values()),
            "total_params": fastmoe.summary(trainer.model).total_params,
            "train_bits_per_byte": mean(trainer.history.losses[-args.window :]),
            "valid_bits_per_byte": trainer.loss_on(corpus.valid),
            "load_cv": mean(load.cv for load in layers),
            "demand_max_over_mean": mean(
                max(load.demand) * len(load.demand) / max(1, sum(load.demand)) for load in layers
            ),
            "drop_rate": mean(load.drop_rate for load in layers),
            "unrouted_tokens": mean(load.unrouted_tokens / load.tokens for load in layers),
            "dead_experts": sum(len(load.dead) for load in layers),
            "median_step_ms": statistics.median(counted) * 1e3,
            "times_topk": statistics.median(a / b for a, b in zip(counted, reference, strict=True)),
        }
        maps[label].close()
        print(label, {name: value for name, value in rows[label].items() if isinstance(value, float)}, flush=True)
    result = {
        "machine": where,
        "corpus": corpus.name,
        "corpus_sha256": corpus.sha256,
        "steps": args.steps,
        "window": args.window,
        "rows": rows,
    }
    args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
