"""`TokenChoiceRouter`: what all built-in routers share whose tokens choose their experts: capacity, padding, scope."""

import dataclasses
import math
from collections.abc import Mapping
from typing import TypedDict

import torch
from torch import Tensor

from fastmoe._errors import check_choice, check_int
from fastmoe.routers.base import Router
from fastmoe.routers.capacity import DROP_BY, expert_capacity, is_limit, over_capacity
from fastmoe.routers.context import RoutingContext
from fastmoe.routers.routing import Routing

SCOPES = ("global", "local")


class TokenChoiceOptions(TypedDict, total=False):
    """The keyword arguments of `TokenChoiceRouter`, which its subclasses hand on."""

    capacity_factor: float | None
    eval_capacity_factor: float | None
    min_capacity: int
    drop_by: str
    stats_scope: str


class TokenChoiceRouter(Router):
    """Each token chooses K experts; an expert may have a capacity.

    Args:
        d_model, num_experts, top_k: D, E, K.
        capacity_factor: an expert takes at most `ceil(capacity_factor * T * K / E)` rows of a batch. The rest are
            dropped: they contribute zero, get no gradient and are counted in `Routing.dropped`. None: no limit.
        eval_capacity_factor: the same in evaluation; None: `capacity_factor`. `math.inf`: no limit.
        min_capacity: an expert takes at least that many rows.
        drop_by: "position" drops later tokens, and second choices before first ones; "weight" drops smaller weights.
        stats_scope: "global": T, capacity and balance losses are of the batch of all processes in training, so that
            they do not depend on how many processes there are; "local": of each process by itself.
    """

    takes_context = True

    def __init__(
        self,
        d_model: int,
        num_experts: int,
        top_k: int = 2,
        *,
        capacity_factor: float | None = None,
        eval_capacity_factor: float | None = None,
        min_capacity: int = 0,
        drop_by: str = "position",
        stats_scope: str = "global",
    ) -> None:
        super().__init__(d_model, num_experts, top_k)
        self.capacity_factor = _check_factor("capacity_factor", capacity_factor)
        own = _check_factor("eval_capacity_factor", eval_capacity_factor)
        self.eval_capacity_factor = self.capacity_factor if own is None else own
        self.min_capacity = check_int("min_capacity", min_capacity, 0)
        self.drop_by = check_choice("drop_by", drop_by, DROP_BY)
        self.stats_scope = check_choice("stats_scope", stats_scope, SCOPES)

    @property
    def causal(self) -> bool:
        """Whether, in evaluation, what a token gets depends on no later token of its sequence.

        With a capacity a later token's first choice takes the place of an earlier one's second.
        """
        return not is_limit(self.eval_capacity_factor) or (self.top_k == 1 and self.drop_by == "position")

    def capacity(self, like_TE: Tensor, context: RoutingContext) -> int | Tensor | None:
        """Rows of the whole batch that one expert takes; None where there is no limit."""
        factor = self.capacity_factor if self.training else self.eval_capacity_factor
        if not is_limit(factor):
            return None
        assert factor is not None
        num_tokens = context.num_tokens(like_TE)
        processes = self.processes(context)
        if processes.size > 1:
            num_tokens = processes.sum(torch.as_tensor(num_tokens, device=like_TE.device))
        return expert_capacity(num_tokens, self.num_experts, self.top_k, factor, self.min_capacity)

    def routing(
        self,
        expert_ids_TK: Tensor,
        weights_TK: Tensor,
        context: RoutingContext,
        losses: Mapping[str, Tensor] | None = None,
        scores_TE: Tensor | None = None,
    ) -> Routing:
        """The router's answer once padding and what is over capacity are taken out."""
        capacity = self.capacity(expert_ids_TK, context)
        if context.token_mask_T is not None and not (context.padding_is_computed and capacity is None):
            expert_ids_TK = torch.where(context.token_mask_T.unsqueeze(1), expert_ids_TK, -1)
        if capacity is None:
            found = Routing.from_topk(expert_ids_TK, weights_TK, self.num_experts, losses, scores_TE)
            return dataclasses.replace(found, dropped=0)
        over_TK = over_capacity(
            expert_ids_TK,
            weights_TK,
            self.num_experts,
            capacity,
            by=self.drop_by,
            processes=self.processes(context),
        )
        kept_TK = expert_ids_TK.masked_fill(over_TK, -1)
        found = Routing.from_topk(kept_TK, weights_TK, self.num_experts, losses, scores_TE)
        demand_E = count_rows(expert_ids_TK, self.num_experts)
        return dataclasses.replace(found, dropped=over_TK.sum(), demand_E=demand_E)

    def extra_repr(self) -> str:
        if not (is_limit(self.capacity_factor) or is_limit(self.eval_capacity_factor)):
            return super().extra_repr()
        return (
            f"{super().extra_repr()}, capacity_factor={self.capacity_factor}, "
            f"eval_capacity_factor={self.eval_capacity_factor}, drop_by={self.drop_by!r}"
        )


def count_rows(expert_ids: Tensor, num_experts: int) -> Tensor:
    """Rows of each expert, int64 `(E,)`; id -1 does not count."""
    ids_N = expert_ids.reshape(-1)
    counts = torch.zeros(num_experts + 1, dtype=torch.int64, device=ids_N.device)
    return counts.scatter_add_(0, ids_N.remainder(num_experts + 1), torch.ones_like(ids_N))[:num_experts]


def _check_factor(name: str, value: float | None) -> float | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0 or math.isnan(value):
        raise ValueError(f"{name} must be a number above 0 or None, got {value!r}")
    return float(value)
