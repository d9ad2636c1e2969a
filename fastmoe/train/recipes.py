"""Recipes: one row is one experiment, with its model, data order, optimizer, schedule and evaluation.

The dense model and its MoE twin of a row have the same active FLOPs: K experts are together as wide as the dense block.
Flags go over a row: `fastmoe train --recipe txl-tiny-moe --steps 100`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from fastmoe._errors import unknown_name
from fastmoe.train.config import DataConfig, ModelConfig, MoEConfig, OptimConfig, RunConfig, TrainConfig

TABULAR = ("mmoe-census", "mmoe-synthetic")
"""Recipes of fastmoe.tabular, with options of their own."""


@dataclass(frozen=True)
class Twins:
    """A dense model, and what makes an MoE of it."""

    dense: str
    moe: str
    model: ModelConfig
    experts: MoEConfig
    optim: OptimConfig
    eval_sequences: int
    eval_every: int

    def config(self, name: str) -> TrainConfig:
        return TrainConfig(
            mode="moe" if name == self.moe else "dense",
            model=self.model,
            moe=self.experts,
            data=DataConfig(eval_sequences=self.eval_sequences),
            optim=self.optim,
            run=RunConfig(out=Path("runs") / name, eval_every=self.eval_every, checkpoint_every=self.eval_every * 5),
        )


TWINS = (
    Twins(  # Dai et al. 2019, enwik8, base; the MoE as FastMoE's paper has it
        dense="txl-enwik8-base",
        moe="txl-enwik8-base-moe64",
        model=ModelConfig(
            arch="transformer_xl",
            block_size=512,
            n_layer=12,
            n_head=8,
            d_model=512,
            d_hidden=2048,
            dropout=0.1,
            model_options={"memory_length": 512},
        ),
        experts=MoEConfig(num_experts=64, top_k=2),
        optim=OptimConfig(
            steps=400_000,
            batch_size=22,
            lr=2.5e-4,
            min_lr=0.0,
            warmup_steps=0,
            weight_decay=0.0,
            beta2=0.999,
            grad_clip=0.25,
        ),
        eval_sequences=0,
        eval_every=4000,
    ),
    Twins(  # GPT-2's smallest in shape, on bytes; the schedule of GPT-3's
        dense="gpt-small",
        moe="gpt-small-moe96",
        model=ModelConfig(block_size=1024, n_layer=12, n_head=12, d_model=768, bias=True),
        experts=MoEConfig(num_experts=96, top_k=2),
        optim=OptimConfig(steps=100_000, batch_size=64, lr=6e-4, min_lr=6e-5, warmup_steps=2000),
        eval_sequences=512,
        eval_every=1000,
    ),
    Twins(  # Shazeer et al. 2017 with FastMoE's 512 experts, 2 of them for a token
        dense="lstm-dense",
        moe="lstm-moe512",
        model=ModelConfig(arch="lstm", block_size=128, d_model=512, d_hidden=2048, dropout=0.1),
        experts=MoEConfig(num_experts=512, top_k=2, router="noisy_topk"),
        optim=OptimConfig(steps=50_000, batch_size=256, lr=1e-3, min_lr=1e-5, warmup_steps=1000, weight_decay=0.0),
        eval_sequences=0,
        eval_every=1000,
    ),
    Twins(
        dense="gpt-tiny",
        moe="gpt-tiny-moe",
        model=ModelConfig(
            block_size=64, n_layer=2, n_head=4, d_model=64, init_scale=5.0, model_options={"positions": "rotary"}
        ),
        experts=MoEConfig(num_experts=16, top_k=2),
        optim=OptimConfig(steps=1200, batch_size=32, lr=4e-3, min_lr=4e-4),
        eval_sequences=512,
        eval_every=100,
    ),
    Twins(
        dense="txl-tiny",
        moe="txl-tiny-moe",
        model=ModelConfig(
            arch="transformer_xl",
            block_size=64,
            n_layer=2,
            n_head=4,
            d_model=64,
            init_scale=5.0,
            model_options={"memory_length": 64, "pre_norm": True},
        ),
        experts=MoEConfig(num_experts=16, top_k=2),
        optim=OptimConfig(steps=1000, batch_size=32, lr=4e-3, min_lr=4e-4),
        eval_sequences=512,
        eval_every=100,
    ),
    Twins(
        dense="lstm-tiny",
        moe="lstm-tiny-moe",
        model=ModelConfig(arch="lstm", block_size=64, d_model=64, init_scale=5.0),
        experts=MoEConfig(num_experts=16, top_k=2, router="noisy_topk"),
        optim=OptimConfig(steps=1200, batch_size=32, lr=4e-3, min_lr=4e-4),
        eval_sequences=512,
        eval_every=100,
    ),
)

RECIPES: dict[str, TrainConfig] = {name: twins.config(name) for twins in TWINS for name in (twins.dense, twins.moe)}


def recipe(name: str) -> TrainConfig:
    """Raises ValueError: there is no such recipe."""
    if name not in RECIPES:
        raise unknown_name("recipe", name, [*RECIPES, *TABULAR])
    return RECIPES[name]
