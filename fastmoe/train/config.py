"""`TrainConfig`: everything that a training run is told, in six typed sections.

A field is a TOML key in its section's table and a flag of `fastmoe train` (`--data` for `path`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from fastmoe.train.key_values import KEY_VALUES

Kind = Literal["dense", "moe"]
Arch = Literal["gpt", "transformer_xl", "lstm"]
Mode = Literal["dense", "moe", "compare"]

NAMES: dict[Kind, str] = {"dense": "dense", "moe": "MoE"}


def check_at_least(minimum: float, **values: float) -> None:
    """Raise a ValueError that names the first value below `minimum`."""
    for name, value in values.items():
        if value < minimum:
            raise ValueError(f"{name} must be at least {minimum}; got {value}")


@dataclass(frozen=True)
class ModelConfig:
    arch: Arch = "gpt"
    """The Transformer-XL and the LSTM have memory: they learn consecutive segments of block_size bytes."""
    block_size: int = 256
    """Positions that the model sees at once, in bytes."""
    n_layer: int = 6
    n_head: int = 6
    d_model: int = 384
    d_hidden: int | None = None
    """Hidden width of a dense feed-forward block; None is 4 * d_model."""
    dropout: float = 0.0
    bias: bool = False
    init_scale: float = 1.0
    """Factor on the matrices that the blocks start with."""
    model_options: Annotated[dict[str, Any], KEY_VALUES] = field(default_factory=dict)
    """More fields of the model's config in fastmoe.models, memory_length=512; in TOML a table [model.model_options].
    They go over those of a recipe or a file one by one."""

    def __post_init__(self) -> None:
        check_at_least(1, block_size=self.block_size, n_layer=self.n_layer, n_head=self.n_head, d_model=self.d_model)
        check_at_least(1, d_hidden=self.dense_hidden)
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be in [0, 1); got {self.dropout}")
        if not 0 < self.init_scale < math.inf:
            raise ValueError(f"init_scale must be a finite number above 0; got {self.init_scale}")

    @property
    def has_memory(self) -> bool:
        """Whether the model carries memory from one segment to the next."""
        return self.arch != "gpt"

    @property
    def dense_hidden(self) -> int:
        return 4 * self.d_model if self.d_hidden is None else self.d_hidden


@dataclass(frozen=True)
class MoEConfig:
    num_experts: int = 8
    top_k: int = 2
    expert_hidden: int | None = None
    """Hidden width of one expert; None is the dense block's divided by top_k: equal FLOPs per token."""
    router: str = "topk"
    """A name in fastmoe.routers.ROUTERS; docs/routers.md has them all."""
    router_options: Annotated[dict[str, Any], KEY_VALUES] = field(default_factory=dict)
    """The router's own options; in TOML a table [moe.router_options]."""
    aux_loss_weight: float | None = None
    """Weight of the load-balance loss, for routers that have it; None is the router's default."""
    z_loss_weight: float | None = None
    """Weight of the z-loss, for routers that have it; None is the router's default."""
    every: int = 1
    """Make an MoE of every n-th feed-forward block."""

    def __post_init__(self) -> None:
        check_at_least(1, num_experts=self.num_experts, top_k=self.top_k, every=self.every)
        check_at_least(0, **{name: value for name, value in self.loss_weights.items() if value is not None})
        if self.top_k > self.num_experts:
            raise ValueError(f"top_k must be at most num_experts={self.num_experts}; got {self.top_k}")

    @property
    def loss_weights(self) -> dict[str, float | None]:
        return {"aux_loss_weight": self.aux_loss_weight, "z_loss_weight": self.z_loss_weight}


@dataclass(frozen=True)
class DataConfig:
    path: Annotated[Path | None, tyro.conf.arg(name="data", metavar="FILE")] = None
    """A file to learn, plain, .gz or .zip; None is the source text of this Python's standard library."""
    valid: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """A second file to validate on: all of the first is trained on then. None splits the first one 90/5/5 percent."""
    eval_sequences: int = 256
    """Held-out sequences of block_size bytes in each evaluation, the same ones each time; 0 is all of them."""

    def __post_init__(self) -> None:
        check_at_least(0, eval_sequences=self.eval_sequences)


@dataclass(frozen=True)
class OptimConfig:
    steps: int = 5000
    batch_size: int = 32
    """Sequences per step, over all processes and micro-steps."""
    grad_accumulation: int = 1
    """Micro-steps per step; batch_size is divided among them."""
    lr: float = 1e-3
    min_lr: float = 1e-4
    """Learning rate at the last step."""
    warmup_steps: int = 100
    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    grad_clip: float = 1.0
    """Largest gradient norm; 0 is no clipping."""

    def __post_init__(self) -> None:
        check_at_least(1, steps=self.steps, batch_size=self.batch_size, grad_accumulation=self.grad_accumulation)
        check_at_least(
            0, lr=self.lr, min_lr=self.min_lr, warmup_steps=self.warmup_steps, weight_decay=self.weight_decay
        )
        check_at_least(0, grad_clip=self.grad_clip)


@dataclass(frozen=True)
class ParallelConfig:
    """Of many processes; one alone has no use for it."""

    ep: int = 1
    """Processes that the experts are spread over; must divide the number of processes."""
    engine: Literal["ddp", "fsdp"] = "ddp"
    """What keeps replicas alike: DistributedDataParallel, or fully_shard, which spreads the dense parameters too."""
    ep_chunks: int = 1
    """Tokens are exchanged in so many parts, one while another is computed."""
    suppress_duplicates: bool = False
    """A token travels once to a process where it has several experts."""
    timeout: int = 600
    """Seconds after which waiting for a process that hangs is an error."""

    def __post_init__(self) -> None:
        check_at_least(1, ep=self.ep, ep_chunks=self.ep_chunks, timeout=self.timeout)


@dataclass(frozen=True)
class RunConfig:
    out: Path = Path("runs/train")
    """Folder for checkpoints, TensorBoard logs, figures and results."""
    resume: bool = False
    """Continue from the newest checkpoint in `out`; start anew where there is none."""
    overwrite: bool = False
    """Delete the checkpoints of an earlier run in `out`, and write over its results."""
    seed: int = 1
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """bfloat16 is autocast; auto uses it on a GPU that has it."""
    log_every: int = 10
    eval_every: int = 250
    checkpoint_every: int = 500
    keep_checkpoints: int = 2
    sample_bytes: int = 400
    """Length of the text sampled at the end."""
    tensorboard: bool = True
    monitor: bool = False
    """Watch the experts' load: load.jsonl and TensorBoard at every log step, a table and load.png at the end."""

    def __post_init__(self) -> None:
        check_at_least(1, log_every=self.log_every, eval_every=self.eval_every, keep_checkpoints=self.keep_checkpoints)
        check_at_least(1, checkpoint_every=self.checkpoint_every)
        check_at_least(0, sample_bytes=self.sample_bytes)


@dataclass(frozen=True)
class TrainConfig:
    mode: Mode = "moe"
    """Train the dense model, the MoE, or both side by side on the same data."""
    model: ModelConfig = field(default_factory=ModelConfig)
    moe: MoEConfig = field(default_factory=MoEConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    run: RunConfig = field(default_factory=RunConfig)

    def __post_init__(self) -> None:
        if self.moe.expert_hidden is None and self.model.dense_hidden % self.moe.top_k:
            raise ValueError(
                f"the dense hidden width {self.model.dense_hidden} does not divide by top_k={self.moe.top_k}; "
                "give expert_hidden"
            )
