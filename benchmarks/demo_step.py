"""A training step of the demo's MoE model, tokens per second with each backend: `python benchmarks/demo_step.py`."""

import argparse
import copy
import json
import statistics
import time
from pathlib import Path

import torch

import fastmoe
from fastmoe.bench.machine import machine
from fastmoe.train.build import build_model
from fastmoe.train.options import preset


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "demo_step.json")
    arguments = parser.parse_args()
    config = preset("demo")
    ids = torch.randint(256, (config.optim.batch_size, config.model.block_size + 1))
    base = build_model(config, "moe")
    models = {name: copy.deepcopy(base) for name in ("torch", "native")}
    for name, model in models.items():
        for layer in fastmoe.moe_layers(model).values():
            layer.backend = layer.dispatcher.backend = layer.experts.backend = name
    optimizers = {name: torch.optim.AdamW(model.parameters()) for name, model in models.items()}
    times: dict[str, list[float]] = {name: [] for name in models}
    for _ in range(arguments.rounds + 2):
        for name, model in models.items():
            start = time.perf_counter()
            step(model, optimizers[name], ids)
            times[name].append(time.perf_counter() - start)
    tokens = ids[:, 1:].numel()
    medians = {name: statistics.median(runs[2:]) for name, runs in times.items()}
    ratio = statistics.median(t / n for t, n in zip(times["torch"][2:], times["native"][2:], strict=True))
    result = {"machine": machine(), "tokens": tokens, "rounds": arguments.rounds, "native_over_torch": ratio}
    result["tokens_per_second"] = {name: tokens / seconds for name, seconds in medians.items()}
    arguments.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result["tokens_per_second"] | {"native over torch": ratio}))


def step(model: torch.nn.Module, optimizer: torch.optim.Optimizer, ids: torch.Tensor) -> None:
    optimizer.zero_grad()
    _, loss = model(ids[:, :-1], ids[:, 1:])
    loss.backward()
    optimizer.step()


if __name__ == "__main__":
    main()
