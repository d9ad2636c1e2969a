"""txl-enwik8-base beside txl-enwik8-base-moe64 on a GPU, real sizes: step times, and loss over steps and seconds.

    python benchmarks/txl_gpu.py --data enwik8                        # 8 minutes of training each
    python benchmarks/txl_gpu.py --data a.txt --valid b.txt --seconds 120
    python benchmarks/txl_gpu.py --data a.txt --valid b.txt --dry --out FOLDER    # txl-tiny, seconds on a CPU

It needs torch alone; the picture also matplotlib. The two take turns of 20 steps, so that whatever else the machine
does slows both. Batches and optimizer are the recipe's, the learning rate constant after 200 steps of warm-up, as
the number of steps is not known beforehand. Writes OUT/txl_gpu.json and OUT/txl_gpu.png. Target: a step of the MoE
takes at most 1.5 times the dense one's.
"""

import argparse
import json
import statistics
import time
from importlib.util import find_spec
from pathlib import Path

import torch

import fastmoe
from fastmoe.bench.machine import device_of, machine
from fastmoe.models import build, language_model_step
from fastmoe.train.corpus import Corpus, load_corpus
from fastmoe.train.streams import Streams

TARGET = 1.5
TURN, WARM_UP, EVAL_EVERY, EVAL_SEQUENCES = 20, 200, 100, 256
NATS = 0.6931471805599453  # in a bit


class Run:
    """One model in training."""

    def __init__(self, name: str, corpus: Corpus, streams: Streams, lr: float, device: str) -> None:
        torch.manual_seed(1)
        self.name, self.corpus, self.streams, self.lr, self.device = name, corpus, streams, lr, device
        self.model = build(name).to(device)
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=lr, fused=True)
        self.memory: torch.Tensor | None = None
        self.step, self.seconds = 0, 0.0
        self.turns: list[float] = []
        self.curve: list[dict[str, float]] = []

    def loss(self, tokens_BS, targets_BS, memory):
        with torch.autocast(self.device, torch.bfloat16, enabled=self.device == "cuda"):
            return language_model_step(self.model, tokens_BS.to(self.device), targets_BS.to(self.device), memory)

    def take_turn(self) -> None:
        started = self.now()
        for _ in range(TURN):
            for group in self.optimizer.param_groups:
                group["lr"] = self.lr * min(1.0, (self.step + 1) / WARM_UP)
            loss, self.memory = self.loss(*self.streams.draw(self.corpus.train, self.step), self.memory)
            loss.backward()
            fastmoe.clip_grad_norm_(self.model, 0.25)
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.step += 1
        self.turns.append((self.now() - started) / TURN)
        self.seconds += self.turns[-1] * TURN
        if self.step % EVAL_EVERY == 0:
            self.evaluate()

    @torch.no_grad()
    def evaluate(self) -> None:
        self.model.eval()
        nats, count, memory = 0.0, 0, None
        for batch in self.streams.held_out(self.corpus.valid):
            loss, memory = self.loss(batch.tokens_BS, batch.targets_BS, None if batch.fresh else memory)
            nats += loss.item() * batch.targets_BS.numel()
            count += batch.targets_BS.numel()
        self.model.train()
        point = {"step": self.step, "seconds": self.seconds, "bits_per_byte": nats / count / NATS}
        self.curve.append(point)
        print(
            f"{self.name}: step {self.step}, {self.seconds:.0f} s, {point['bits_per_byte']:.4f} bits/byte", flush=True
        )

    def now(self) -> float:
        if self.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def result(self) -> dict:
        parameters = sum(parameter.numel() for parameter in self.model.parameters())
        warm = self.turns[2:] or self.turns
        return {"parameters": parameters, "step_ms": statistics.median(warm) * 1000, "curve": self.curve}


def train(given: argparse.Namespace) -> dict:
    dense, moe = ("txl-tiny", "txl-tiny-moe") if given.dry else ("txl-enwik8-base", "txl-enwik8-base-moe64")
    corpus = load_corpus(given.data, given.valid)
    streams = Streams(64, 8, 32, seed=1) if given.dry else Streams(512, 22, EVAL_SEQUENCES, seed=1)
    device = "cpu" if given.dry else "cuda"
    runs = [Run(name, corpus, streams, 4e-3 if given.dry else 2.5e-4, device) for name in (dense, moe)]
    while any(run.seconds < given.seconds for run in runs):
        for run in runs:
            if run.seconds < given.seconds:
                run.take_turn()
    for run in runs:
        if not run.curve or run.curve[-1]["step"] != run.step:
            run.evaluate()
    results = {run.name: run.result() for run in runs}
    return {
        "machine": machine() | device_of(device),
        "dry": given.dry,
        "data": corpus.name,
        "sha256": corpus.sha256,
        "seconds": given.seconds,
        "runs": results,
        "step_time_ratio": results[moe]["step_ms"] / results[dense]["step_ms"],
        "target": None if given.dry else TARGET,
    }


def draw(result: dict, path: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    FigureCanvasAgg(figure)
    for panel, axis in zip(figure.subplots(1, 2, sharey=True), ("step", "seconds"), strict=True):
        for name, run in result["runs"].items():
            points = [point for point in run["curve"] if point["step"]]
            panel.plot([p[axis] for p in points], [p["bits_per_byte"] for p in points], marker=".", label=name)
        panel.set_xlabel({"step": "steps", "seconds": "seconds of training"}[axis])
        panel.grid(alpha=0.3)
        panel.legend()
    figure.axes[0].set_ylabel("validation loss, bits per byte")
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--valid", type=Path)
    parser.add_argument("--seconds", type=float, default=480.0, help="of training, for each of the two")
    parser.add_argument("--dry", action="store_true", help="txl-tiny on a CPU")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    given = parser.parse_args()
    result = train(given)
    given.out.mkdir(parents=True, exist_ok=True)
    (given.out / "txl_gpu.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    ratio = result["step_time_ratio"]
    print(f"a step of the MoE takes {ratio:.2f} times the dense one's" + ("" if given.dry else f"; target {TARGET}"))
    if find_spec("matplotlib") is None:
        print("matplotlib is not installed: no picture")
    else:
        draw(result, given.out / "txl_gpu.png")


if __name__ == "__main__":
    main()
