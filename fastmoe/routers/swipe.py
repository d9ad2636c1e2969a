"""SWIPE: whoever finds an expert full goes to the next best one with room."""

import dataclasses
from typing import Unpack

import torch
from torch import Tensor

from fastmoe._errors import check_number
from fastmoe.routers.base import register_router
from fastmoe.routers.context import RoutingContext
from fastmoe.routers.losses import load_balance_loss
from fastmoe.routers.routing import Routing
from fastmoe.routers.serial import serve_in_turn
from fastmoe.routers.token_choice import TokenChoiceOptions, TokenChoiceRouter, count_rows


@register_router("swipe")
class SwipeRouter(TokenChoiceRouter):
    """`s = softmax(W x)`; tokens take K experts each, one after another: first all tokens their first one, then all
    their second one, and so on; every time the expert of largest s that still has room and that the token does not
    have yet. Where there is none the choice is dropped.

    After the gate of FastMoE's SWIPE; this is its definition here. A token's first choice may thus find room taken by
    what an earlier token could not get elsewhere. Weights are s, for K > 1 divided by its sum over the experts got.
    Where there is a limit, each choice waits for the device up to E times.

    Args:
        d_model, num_experts, top_k: D, E, K.
        aux_loss_weight: weight of `load_balance_loss` over the K experts of largest s, full or not.
        capacity_factor: 1.0 unless given, an even load; in evaluation too, unless `eval_capacity_factor` is given.
        drop_by: "position".
        eval_capacity_factor, min_capacity, stats_scope: see `TokenChoiceRouter`; with "global" tokens of lower
            ranks come first.

    Raises:
        ValueError: a `drop_by` other than "position"; an option that does not fit.
    """

    def __init__(
        self,
        d_model: int,
        num_experts: int,
        top_k: int = 2,
        *,
        aux_loss_weight: float = 0.0,
        **options: Unpack[TokenChoiceOptions],
    ) -> None:
        given: TokenChoiceOptions = {"capacity_factor": 1.0, **options}
        super().__init__(d_model, num_experts, top_k, **given)
        if self.drop_by != "position":
            raise ValueError(f"router 'swipe' serves tokens by position: leave drop_by out, got {self.drop_by!r}")
        self.aux_loss_weight = check_number("aux_loss_weight", aux_loss_weight)

    def forward(self, x_TD: Tensor, context: RoutingContext | None = None) -> Routing:
        context = context or RoutingContext()
        scores_TE, mask_T = torch.softmax(self.proj(x_TD), dim=1), context.token_mask_T
        wishes_TK = scores_TE.topk(self.top_k, dim=1).indices
        losses = {}
        if self.aux_loss_weight:
            loss = load_balance_loss(scores_TE, wishes_TK, mask_T, self.processes(context))
            losses["load_balance"] = self.aux_loss_weight * loss
        capacity = self.capacity(scores_TE, context)
        if capacity is None:
            return self.routing(wishes_TK, self._weights(scores_TE, wishes_TK), context, losses, scores_TE)
        wishes_TK = wishes_TK if mask_T is None else torch.where(mask_T.unsqueeze(1), wishes_TK, -1)
        got_TK = self._serve(scores_TE.detach(), capacity, context)
        weights_TK = self._weights(scores_TE, got_TK)
        found = Routing.from_topk(got_TK, weights_TK, self.num_experts, losses, scores_TE)
        dropped = ((got_TK == -1) & (wishes_TK != -1)).sum()
        return dataclasses.replace(found, dropped=dropped, demand_E=count_rows(wishes_TK, self.num_experts))

    def _serve(self, scores_TE: Tensor, capacity: int | Tensor, context: RoutingContext) -> Tensor:
        """The experts got, `(T, K)`; -1 for none."""
        mask_T = context.token_mask_T
        scores_TE = scores_TE.nan_to_num(nan=1)  # such a token is served, for its weight to show NaN
        wants_TE = scores_TE if mask_T is None else scores_TE.masked_fill(~mask_T.unsqueeze(1), -torch.inf)
        wants_GE, mine = self.processes(context).gather_rows(wants_TE)
        room_E = torch.full((self.num_experts,), len(wants_GE), device=wants_GE.device).clamp(max=capacity)
        levels = []
        for _ in range(self.top_k):
            ids_G = serve_in_turn(wants_GE, room_E)
            levels.append(ids_G[mine])
            room_E = room_E - count_rows(ids_G, self.num_experts)
            # Who got none is marked as having expert 0, but will get none at the next level either.
            wants_GE = wants_GE.scatter(1, ids_G.clamp(min=0).unsqueeze(1), -torch.inf)
        return torch.stack(levels, dim=1)

    def _weights(self, scores_TE: Tensor, expert_ids_TK: Tensor) -> Tensor:
        weights_TK = torch.where(expert_ids_TK < 0, 0, scores_TE.gather(1, expert_ids_TK.clamp(min=0)))
        if self.top_k == 1:
            return weights_TK
        total_T1 = weights_TK.sum(dim=1, keepdim=True)
        return weights_TK / torch.where(total_T1 > 0, total_T1, 1)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, aux_loss_weight={self.aux_loss_weight}"
