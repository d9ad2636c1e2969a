"""GShard's top-2 gating: the second expert is skipped by chance where it matters little."""

import dataclasses
from typing import Unpack

import torch
from torch import Tensor

from fastmoe._errors import check_number
from fastmoe.routers import noise
from fastmoe.routers.base import register_router
from fastmoe.routers.context import RoutingContext
from fastmoe.routers.losses import load_balance_loss
from fastmoe.routers.routing import Routing
from fastmoe.routers.token_choice import TokenChoiceOptions, TokenChoiceRouter


@register_router("gshard")
class GShardRouter(TokenChoiceRouter):
    """Softmax, the two best experts, weights normalised to sum 1: g1 and g2. In training the second is kept with
    probability min(1, 2 * g2).

    Lepikhin et al. 2020 (2006.16668), algorithm 1. As there, a skipped second choice has taken its place in the
    expert's queue. It is not counted as dropped.

    Args:
        d_model, num_experts: D, E.
        top_k: 2.
        aux_loss_weight: weight of `load_balance_loss` over first choices.
        capacity_factor: 1.0 unless given, the paper's capacity of 2T/E rows; in evaluation 2.0.
        eval_capacity_factor, min_capacity, drop_by, stats_scope: see `TokenChoiceRouter`.

    Raises:
        ValueError: a `top_k` other than 2; an option that does not fit.
    """

    def __init__(
        self,
        d_model: int,
        num_experts: int,
        top_k: int = 2,
        *,
        aux_loss_weight: float = 0.01,
        **options: Unpack[TokenChoiceOptions],
    ) -> None:
        if top_k != 2:
            raise ValueError(f"router 'gshard' sends each token to two experts: give top_k=2, got top_k={top_k!r}")
        given: TokenChoiceOptions = {"capacity_factor": 1.0, "eval_capacity_factor": 2.0, **options}
        super().__init__(d_model, num_experts, top_k, **given)
        self.aux_loss_weight = check_number("aux_loss_weight", aux_loss_weight)

    def forward(self, x_TD: Tensor, context: RoutingContext | None = None) -> Routing:
        context = context or RoutingContext()
        scores_TE = torch.softmax(self.proj(x_TD), dim=1)
        top_TK, expert_ids_TK = scores_TE.topk(self.top_k, dim=1)
        weights_TK = top_TK / top_TK.sum(dim=1, keepdim=True)
        losses = {}
        if self.aux_loss_weight:
            first_T1, processes = expert_ids_TK[:, :1], self.processes(context)
            loss = load_balance_loss(scores_TE, first_T1, context.token_mask_T, processes)
            losses["load_balance"] = self.aux_loss_weight * loss
        routing = self.routing(expert_ids_TK, weights_TK, context, losses, scores_TE)
        return _skip_second(routing, weights_TK) if self.training else routing


def _skip_second(routing: Routing, weights_TK: Tensor) -> Routing:
    """`routing` with second choices taken out by chance, after they have taken their place."""
    second_T = weights_TK[:, 1]
    skipped_T = noise.uniform(second_T) >= 2 * second_T
    skipped_TK = torch.stack([torch.zeros_like(skipped_T), skipped_T], dim=1)
    return dataclasses.replace(routing, expert_ids_N=routing.expert_ids_N.masked_fill(skipped_TK.reshape(-1), -1))
