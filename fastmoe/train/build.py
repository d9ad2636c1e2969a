"""The model, its optimizer and its arithmetic, from a `TrainConfig`."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

import fastmoe
from fastmoe.routers import get_router
from fastmoe.train.batches import Batches, Windows
from fastmoe.train.config import Kind, OptimConfig, ParallelConfig, TrainConfig
from fastmoe.train.models import BLOCKS, VOCAB_SIZE, LanguageModel, build_dense
from fastmoe.train.streams import Streams

BIASES = {"bias", "b1", "b2"}


def build_model(config: TrainConfig, kind: Kind) -> LanguageModel:
    """Dense and MoE differ in their feed-forward blocks alone, and start from equal weights elsewhere."""
    torch.manual_seed(config.run.seed)
    model = build_dense(config.model)
    if kind == "moe":
        make_moe(model, config)
    scale_start(model, config.model.init_scale)
    return model


def make_moe(model: LanguageModel, config: TrainConfig) -> None:
    """Turn the feed-forward blocks into MoE layers and draw their weights as the model draws its own."""
    moe = config.moe
    dense_start = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    fastmoe.moefy(
        model,
        num_experts=moe.num_experts,
        top_k=moe.top_k,
        init="random",
        every=moe.every,
        d_hidden=config.model.dense_hidden // moe.top_k if moe.expert_hidden is None else moe.expert_hidden,
        router=moe.router,
        router_options=router_options(config),
    )
    model.init_weights()
    model.load_state_dict(dense_start, strict=False)
    for layer in fastmoe.moe_layers(model).values():
        if isinstance(layer.router, fastmoe.Router) and layer.router.own_init:
            layer.router.reset_parameters()
    if get_router(moe.router).needs_token_ids:
        fastmoe.feed_token_ids(model, "token_embedding")
    fastmoe.set_aux_loss_scale(model, 1 / config.optim.grad_accumulation)


@torch.no_grad()
def scale_start(model: nn.Module, factor: float) -> None:
    """Multiply every matrix but those of embeddings."""
    if factor == 1:
        return
    for name, parameter in model.named_parameters():
        if parameter.ndim >= 2 and name.rpartition(".")[2] not in BIASES and "embedding" not in name:
            parameter.mul_(factor)


def router_options(config: TrainConfig) -> dict[str, Any]:
    """The router's options as the config gives them, and the size of the vocabulary for one that goes by token ids."""
    moe = config.moe
    weights = {name: weight for name, weight in moe.loss_weights.items() if weight is not None}
    vocabulary = {"vocab_size": VOCAB_SIZE} if get_router(moe.router).needs_token_ids else {}
    fixed = {**vocabulary, **weights}
    twice = sorted(fixed.keys() & moe.router_options.keys())
    if twice:
        raise ValueError(f"leave {', '.join(twice)} out of router_options: the training command sets it")
    return {**fixed, **moe.router_options}


def spread(model: nn.Module, mesh: DeviceMesh, parallel: ParallelConfig) -> None:
    """Spread the model over the processes of a mesh, in place."""
    fastmoe.parallelize(
        model,
        mesh,
        engine=parallel.engine,
        chunks=parallel.ep_chunks,
        suppress_duplicates=parallel.suppress_duplicates,
        blocks=BLOCKS if parallel.engine == "fsdp" else (),
    )


def build_batches(config: TrainConfig) -> Batches:
    make = Streams if config.model.has_memory else Windows
    return make(config.model.block_size, config.optim.batch_size, config.data.eval_sequences, config.run.seed)


def build_optimizer(model: nn.Module, optim: OptimConfig) -> torch.optim.AdamW:
    """AdamW; weight decay is for matrices, not for norms and biases, the experts' stacked (E, H) biases included."""
    matrices: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        is_matrix = parameter.ndim >= 2 and name.rpartition(".")[2] not in BIASES
        (matrices if is_matrix else others).append(parameter)
    groups = [{"params": matrices, "weight_decay": optim.weight_decay}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=optim.lr, betas=(optim.beta1, optim.beta2), fused=True)


def learning_rate(step: int, optim: OptimConfig) -> float:
    """Linear warm-up, then half a cosine from `lr` at its end down to `min_lr` at the last step (counted from 0)."""
    if step < optim.warmup_steps:
        return optim.lr * (step + 1) / optim.warmup_steps
    progress = (step - optim.warmup_steps) / max(1, optim.steps - 1 - optim.warmup_steps)
    return optim.min_lr + (optim.lr - optim.min_lr) * (1 + math.cos(math.pi * min(1.0, progress))) / 2


def autocast_dtype(precision: str, device: torch.device) -> torch.dtype | None:
    """bfloat16, or None for float32 throughout.

    "auto" keeps a CPU in float32.
    """
    if precision == "auto":
        helps = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if helps else None
    return torch.bfloat16 if precision == "bfloat16" else None
