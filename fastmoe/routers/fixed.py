"""Routers that look at nothing: for ablations, debugging and load tests."""

from typing import Unpack

import torch
from torch import Tensor

from fastmoe.routers import noise
from fastmoe.routers.base import register_router
from fastmoe.routers.context import RoutingContext
from fastmoe.routers.routing import Routing
from fastmoe.routers.token_choice import TokenChoiceOptions, TokenChoiceRouter


class FixedRouter(TokenChoiceRouter):
    """K different experts for each token, each with weight 1/K, whatever the token; no parameters."""

    has_proj = False

    def __init__(self, d_model: int, num_experts: int, top_k: int = 2, **options: Unpack[TokenChoiceOptions]) -> None:
        super().__init__(d_model, num_experts, top_k, **options)

    def forward(self, x_TD: Tensor, context: RoutingContext | None = None) -> Routing:
        context = context or RoutingContext()
        dtype = torch.promote_types(x_TD.dtype, torch.float32)
        weights_TK = x_TD.new_full((len(x_TD), self.top_k), 1 / self.top_k, dtype=dtype)
        return self.routing(self._choose(x_TD, context), weights_TK, context)

    def _choose(self, x_TD: Tensor, context: RoutingContext) -> Tensor:
        """Expert ids, int64 `(T, K)`."""
        raise NotImplementedError


@register_router("random")
class RandomRouter(FixedRouter):
    """Each token goes to K experts drawn anew in each pass, all equally likely; `torch.manual_seed` decides.

    Args:
        d_model, num_experts, top_k: D, E, K.
        capacity_factor, eval_capacity_factor, min_capacity, drop_by, stats_scope: see `TokenChoiceRouter`.
    """

    def _choose(self, x_TD: Tensor, context: RoutingContext) -> Tensor:
        like_TE = x_TD.new_empty(len(x_TD), self.num_experts, dtype=torch.float32)
        return noise.uniform(like_TE).topk(self.top_k, dim=1).indices


@register_router("round_robin")
class RoundRobinRouter(FixedRouter):
    """Token t of the batch, padding not counted, goes to experts t * K, ..., t * K + K - 1, modulo E: an even load.

    With the global scope of `TokenChoiceRouter` the batch is that of all processes in training.

    Args:
        d_model, num_experts, top_k: D, E, K.
        capacity_factor, eval_capacity_factor, min_capacity, drop_by, stats_scope: see `TokenChoiceRouter`.
    """

    def _choose(self, x_TD: Tensor, context: RoutingContext) -> Tensor:
        counted_T = context.counted(x_TD).long()
        first = self.processes(context).before(counted_T.sum())
        place_T1 = (first + counted_T.cumsum(0) - counted_T).unsqueeze(1)
        return (place_T1 * self.top_k + torch.arange(self.top_k, device=x_TD.device)) % self.num_experts


@register_router("zero")
class ZeroRouter(FixedRouter):
    """Every token goes to experts 0 to K - 1: the worst load there is.

    Args:
        d_model, num_experts, top_k: D, E, K.
        capacity_factor, eval_capacity_factor, min_capacity, drop_by, stats_scope: see `TokenChoiceRouter`.
    """

    def _choose(self, x_TD: Tensor, context: RoutingContext) -> Tensor:
        return torch.arange(self.top_k, device=x_TD.device).expand(len(x_TD), -1)
