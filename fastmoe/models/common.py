"""What the language models share: their option for experts, their feed-forward block, one step, evaluation mode.

`model(tokens_BS, targets_BS)` calls any of them. Those that remember earlier segments take a third argument, `state`:
None, or the tensor that the call before returned last, with the sequences in dimension 1. `language_model_step` is the
one way to call all of them.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

import fastmoe
from fastmoe.models.checks import check_sizes
from fastmoe.routers import get_router


@dataclass(frozen=True, kw_only=True)
class ExpertOptions:
    """Fields that every model's config has: with `num_experts` above 0 its feed-forward blocks are MoE layers."""

    num_experts: int = 0
    top_k: int = 2
    expert_hidden: int | None = None  # the dense block's hidden width / top_k if None: equal FLOPs per token
    moe_every: int = 1  # an MoE of every n-th block
    router: str = "topk"
    router_options: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        check_sizes(self, 0, "num_experts")
        check_sizes(self, 1, "top_k", "expert_hidden", "moe_every")


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


def put_experts(
    model: nn.Module, blocks: Iterable[nn.Module], options: ExpertOptions, d_hidden: int, vocab_size: int
) -> None:
    """Make an MoE layer of each block's `mlp`, of hidden width `d_hidden`, where the options ask for experts.

    `fastmoe.moefy` does it for one; the others get a copy, as large blocks take it long to look at: `init_weights`,
    which follows, makes them differ. A router that goes by token ids gets those of the model's `token_embedding`.
    """
    if not options.num_experts:
        return
    chosen = list(blocks)[options.moe_every - 1 :: options.moe_every]
    if not chosen:
        raise ValueError(f"moe_every={options.moe_every} chooses none of the model's blocks")
    if options.expert_hidden is None and d_hidden % options.top_k:
        raise ValueError(f"d_hidden={d_hidden} does not divide by top_k={options.top_k}: give expert_hidden")
    by_ids = get_router(options.router).needs_token_ids
    moe = fastmoe.moefy(
        chosen[0].get_submodule("mlp"),
        options.num_experts,
        options.top_k,
        init="random",
        d_hidden=d_hidden // options.top_k if options.expert_hidden is None else options.expert_hidden,
        router=options.router,
        router_options=({"vocab_size": vocab_size} if by_ids else {}) | (options.router_options or {}),
    )
    for number, block in enumerate(chosen):
        block.mlp = copy.deepcopy(moe) if number else moe
    if by_ids:
        fastmoe.feed_token_ids(model, "token_embedding")


def tokens_go_alone(model: nn.Module) -> bool:
    """Whether in evaluation no router's answer for a token depends on other tokens, through a capacity or a choice."""
    routers = [layer.router for layer in fastmoe.moe_layers(model).values()]
    factors = [getattr(router, "eval_capacity_factor", None) for router in routers]
    unlimited = all(factor is None or math.isinf(factor) for factor in factors)
    return unlimited and all(getattr(router, "causal", True) for router in routers)


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """`model.eval()`; afterwards each module is in its own mode again, also after an error."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


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
