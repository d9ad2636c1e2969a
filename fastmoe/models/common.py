"""What the language models share: their option for experts, their feed-forward block, their initial weights, one step.

Every language model here is called `model(tokens_BS, targets_BS=None, state=None)`; `state` is what it remembers of
earlier segments: None, or a tensor with the sequences in dimension 1. `language_model_step` is the one way to call all
of them.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import fastmoe
from fastmoe.experts import reset_where_possible

RESIDUAL_OUTPUTS = ("c_proj.weight", "experts.w2")


@dataclass(frozen=True, kw_only=True)
class ExpertOptions:
    """Fields that every model's config has: with `num_experts` above 0 its feed-forward blocks are MoE layers."""

    num_experts: int = 0
    top_k: int = 2
    expert_hidden: int | None = None  # the dense block's hidden width / top_k if None: equal FLOPs per token
    moe_every: int = 1  # an MoE of every n-th block
    router: str = "topk"
    router_options: dict[str, Any] | None = None


class FeedForward(nn.Module):
    """`W2 dropout(relu(W1 x))`, under names that `fastmoe.moefy` knows."""

    def __init__(self, d_model: int, d_hidden: int, dropout: float) -> None:
        super().__init__()
        self.c_fc = nn.Linear(d_model, d_hidden)
        self.act = nn.ReLU()
        self.hidden_dropout = nn.Dropout(dropout)
        self.c_proj = nn.Linear(d_hidden, d_model)

    def forward(self, x_BSD: Tensor) -> Tensor:
        return self.c_proj(self.hidden_dropout(self.act(self.c_fc(x_BSD))))


def put_experts(blocks: Iterable[nn.Module], options: ExpertOptions, d_hidden: int) -> None:
    """Make an MoE layer of each block's `mlp`, of hidden width `d_hidden`, where the options ask for experts.

    `fastmoe.moefy` does it for one; the others get a copy, as large blocks take it long to look at.
    """
    if not options.num_experts:
        return
    chosen = list(blocks)[options.moe_every - 1 :: options.moe_every]
    if not chosen:
        raise ValueError(f"moe_every={options.moe_every} chooses none of the model's blocks")
    if options.expert_hidden is None and d_hidden % options.top_k:
        raise ValueError(f"d_hidden={d_hidden} does not divide by top_k={options.top_k}: give expert_hidden")
    moe = fastmoe.moefy(
        chosen[0].get_submodule("mlp"),
        options.num_experts,
        options.top_k,
        init="random",
        d_hidden=d_hidden // options.top_k if options.expert_hidden is None else options.expert_hidden,
        router=options.router,
        router_options=options.router_options,
    )
    for number, block in enumerate(chosen):
        block.mlp = copy.deepcopy(moe) if number else moe
        reset_where_possible(block.mlp.router)


@torch.no_grad()
def draw_weights(model: nn.Module, std: float, residual_std: float, skip: Callable[[str], bool] | None = None) -> None:
    """Draw every matrix from N(0, std), what writes into the residual stream from N(0, residual_std); biases are 0.

    It goes by parameter names, experts included. Norms, names that `skip` holds for, and routers with a start of their
    own keep their values.
    """
    kept = {
        id(parameter): parameter.clone()
        for layer in fastmoe.moe_layers(model).values()
        if getattr(layer.router, "own_init", False)
        for parameter in layer.router.parameters()
    }
    for name, parameter in model.named_parameters():
        if "norm" in name or (skip is not None and skip(name)):
            continue
        if name.endswith(("bias", "experts.b1", "experts.b2")):
            parameter.zero_()
        else:
            parameter.normal_(std=residual_std if name.endswith(RESIDUAL_OUTPUTS) else std)
        if id(parameter) in kept:
            parameter.copy_(kept[id(parameter)])


def tokens_go_alone(model: nn.Module) -> bool:
    """Whether in evaluation no router's answer for a token depends on other tokens, through a capacity or a choice."""
    routers = [layer.router for layer in fastmoe.moe_layers(model).values()]
    factors = [getattr(router, "eval_capacity_factor", None) for router in routers]
    unlimited = all(factor is None or math.isinf(factor) for factor in factors)
    return unlimited and all(getattr(router, "causal", True) for router in routers)


def language_model_step(
    model: nn.Module, tokens_BS: Tensor, targets_BS: Tensor, state: Tensor | None = None, **options: Any
) -> tuple[Tensor, Tensor | None]:
    """The mean cross entropy in nats, and the state for the segment that follows (None where the model has none).

    It calls the model itself, so that `DistributedDataParallel` and `fully_shard` see the forward pass.
    """
    answer = (
        model(tokens_BS, targets_BS, **options) if state is None else model(tokens_BS, targets_BS, state, **options)
    )
    return answer[1], answer[2] if len(answer) > 2 else None
