"""An upcycled LLaMA beside the dense one it was made from, both fine-tuned by transformers' Trainer.

    python benchmarks/finetune_hf.py \\
        --pretrain tinyshakespeare.txt --text wikitext2.valid.txt --held-out wikitext2.test.txt

A dense model learns the bytes of the first text. From there it and its MoE twins go on with the second text: the same
steps, batches and learning rates, with gradient accumulation, and are judged on the third. With `top_k=1` an expert is
as wide as the dense block: equal active FLOPs, the router's aside.
"""

import argparse
import copy
import json
import tempfile
import time
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from torch.utils.data import Dataset
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, Trainer, TrainingArguments

import fastmoe
from fastmoe.bench.machine import machine

HERE = Path(__file__).parent
LENGTH, BATCH, ACCUMULATE = 128, 8, 2
TWINS = {"dense": None, "8 experts, top_k 1": (8, 1), "8 experts, top_k 2": (8, 2)}


class Bytes(Dataset):
    """A text's bytes in pieces of `LENGTH`, at most `most` of them, evenly spread."""

    def __init__(self, path: Path, most: int | None = None) -> None:
        ids = torch.frombuffer(bytearray(path.read_bytes()), dtype=torch.uint8).long()
        self.pieces = ids[: len(ids) // LENGTH * LENGTH].view(-1, LENGTH)
        if most is not None:
            self.pieces = self.pieces[:: max(1, len(self.pieces) // most)][:most]

    def __len__(self) -> int:
        return len(self.pieces)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.pieces[index], "labels": self.pieces[index]}


def train(model: PreTrainedModel, text: Dataset, steps: int, lr: float, seed: int, held_out: Dataset | None) -> dict:
    """Train in place; the held-out loss in bits per byte over the steps, and the seconds of training."""
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            max_steps=steps,
            per_device_train_batch_size=BATCH,
            per_device_eval_batch_size=4 * BATCH,
            gradient_accumulation_steps=ACCUMULATE,
            learning_rate=lr,
            warmup_steps=steps // 20,
            weight_decay=0.1,
            eval_strategy="no" if held_out is None else "steps",
            eval_steps=max(1, steps // 10),
            eval_on_start=held_out is not None,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            seed=seed,
            use_cpu=True,
        )
        trainer = Trainer(model=model, args=arguments, train_dataset=text, eval_dataset=held_out)
        start = time.monotonic()
        trainer.train()
        seconds = time.monotonic() - start
    log = [entry for entry in trainer.state.log_history if "eval_loss" in entry]
    bits = 1 / torch.log(torch.tensor(2.0)).item()
    return {"steps": [e["step"] for e in log], "bits": [e["eval_loss"] * bits for e in log], "seconds": seconds}


def pretrained(path: Path, steps: int) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256, hidden_size=128, intermediate_size=384, num_hidden_layers=4, num_attention_heads=4,
        max_position_embeddings=LENGTH,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    train(model, Bytes(path), steps, 3e-3, 0, None)
    return model


def draw(runs: list[dict], path: Path) -> None:
    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    for number, name in enumerate(TWINS):
        for run in (run for run in runs if run["name"] == name):
            label = name if run["seed"] == 0 else None
            axes.plot(run["steps"], run["bits"], color=f"C{number}", label=label, alpha=0.8)
    bits = [bits for run in runs for bits in run["bits"][1:]]
    axes.set(
        xlabel="steps of fine-tuning", ylabel="held-out loss, bits per byte", ylim=(min(bits) - 0.05, max(bits) + 0.1)
    )
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("--pretrain", "--text", "--held-out"):
        parser.add_argument(name, type=Path, required=True)
    parser.add_argument("--pretrain-steps", type=int, default=400)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--out", type=Path, default=HERE / "results" / "finetune_hf.json")
    parser.add_argument("--picture", type=Path, default=HERE.parent / "docs" / "images" / "finetune_hf.png")
    options = parser.parse_args()

    dense = pretrained(options.pretrain, options.pretrain_steps)
    text, held_out = Bytes(options.text), Bytes(options.held_out, 256)
    runs = []
    for seed in range(options.seeds):
        for name, experts in TWINS.items():
            torch.manual_seed(seed)
            model = copy.deepcopy(dense)
            model = model if experts is None else fastmoe.moefy(model, *experts)
            summary = fastmoe.summary(model)
            figures = {"name": name, "seed": seed, "total": summary.total_params, "active": summary.active_params}
            runs.append(figures | train(model, text, options.steps, 1e-3, seed, held_out))
            print(name, seed, [round(b, 3) for b in runs[-1]["bits"]], f"{runs[-1]['seconds']:.0f} s", flush=True)
    files = {key: getattr(options, key).name for key in ("pretrain", "text", "held_out")}
    settings = files | {"steps": options.steps, "pretrain_steps": options.pretrain_steps}
    options.out.write_text(json.dumps({"machine": machine(), "settings": settings, "runs": runs}, indent=1) + "\n")
    draw(runs, options.picture)


if __name__ == "__main__":
    main()
