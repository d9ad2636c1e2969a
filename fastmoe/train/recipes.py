"""Recipes: one row is one experiment, with its model, data order, optimizer, schedule and evaluation.

The dense model and its MoE twin of a row have the same active FLOPs: K experts are together as wide as the dense block.
Flags go over a row: `fastmoe train --recipe txl-tiny-moe --steps 100`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from fastmoe._errors import unknown_name
from fastmoe.train.config import DataConfig, OptimConfig, RunConfig, TrainConfig
from fastmoe.train.models import named_experts, named_shape

TABULAR = ("mmoe-census", "mmoe-synthetic")
"""Recipes of fastmoe.tabular, with options of their own."""


@dataclass(frozen=True)
class Twins:
    """How a dense model and its MoE twin are trained; their sizes are those of `fastmoe.models.NAMED`."""

    dense: str
    moe: str
    optim: OptimConfig
    eval_sequences: int
    eval_every: int
    segment: int | None = None
    """Bytes at once, of models with memory."""
    init_scale: float = 1.0

    def config(self, name: str) -> TrainConfig:
        return TrainConfig(
            mode="moe" if name == self.moe else "dense",
            model=named_shape(self.dense, self.segment, self.init_scale),
            moe=named_experts(self.moe),
            data=DataConfig(eval_sequences=self.eval_sequences),
            optim=self.optim,
            run=RunConfig(out=Path("runs") / name, eval_every=self.eval_every, checkpoint_every=self.eval_every),
        )


TWINS = (
    Twins(  # Dai et al. 2019, enwik8, base; the MoE as FastMoE's paper has it
        dense="txl-enwik8-base",
        moe="txl-enwik8-base-moe64",
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
        segment=512,
    ),
    Twins(  # the learning rate of GPT-3's smallest (Brown et al. 2020, table 2.1)
        dense="gpt-small",
        moe="gpt-small-moe96",
        optim=OptimConfig(steps=100_000, batch_size=64, lr=6e-4, min_lr=6e-5, warmup_steps=2000),
        eval_sequences=512,
        eval_every=1000,
    ),
    Twins(  # Shazeer et al. 2017 with FastMoE's 512 experts, 2 of them for a token
        dense="lstm-dense",
        moe="lstm-moe512",
        optim=OptimConfig(steps=50_000, batch_size=256, lr=1e-3, min_lr=1e-5, warmup_steps=1000, weight_decay=0.0),
        eval_sequences=0,
        eval_every=1000,
        segment=128,
    ),
    *(
        Twins(
            dense=name,
            moe=f"{name}-moe",
            optim=OptimConfig(steps=steps, batch_size=32, lr=4e-3, min_lr=4e-4),
            eval_sequences=512,
            eval_every=100,
            segment=64,
            init_scale=5.0,
        )
        for name, steps in (("gpt-tiny", 1200), ("txl-tiny", 1000), ("lstm-tiny", 1200))
    ),
)

RECIPES: dict[str, TrainConfig] = {name: twins.config(name) for twins in TWINS for name in (twins.dense, twins.moe)}


def recipe(name: str) -> TrainConfig:
    """Raises ValueError: there is no such recipe."""
    if name not in RECIPES:
        raise unknown_name("recipe", name, [*RECIPES, *TABULAR])
    return RECIPES[name]
