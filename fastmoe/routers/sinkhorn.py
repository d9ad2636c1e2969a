"""Sinkhorn routing: in training tokens choose by a transport plan that loads every expert alike."""

from typing import Unpack

import torch
from torch import Tensor

from fastmoe._errors import check_choice, check_int, check_number
from fastmoe.routers.base import register_router
from fastmoe.routers.context import RoutingContext
from fastmoe.routers.routing import Routing
from fastmoe.routers.token_choice import TokenChoiceOptions, TokenChoiceRouter
from fastmoe.routers.topk import SCORE_FUNCTIONS


@register_router("sinkhorn")
class SinkhornRouter(TokenChoiceRouter):
    """In training each token goes to the K experts of its largest entries in the transport plan
    `exp(W x / temperature + u_t + v_e)`, whose rows sum to 1/T and columns to 1/E; in evaluation to those of largest
    W x. Weights are the chosen experts' scores; no gradient goes through the plan.

    S-BASE, Clark et al. 2022 (2202.01169), section 3.1; with the scores of Megatron-Core. The load is about even
    without a loss, not exactly.

    Args:
        d_model, num_experts, top_k: D, E, K.
        score_function: "softmax" or "sigmoid", of W x; None: sigmoid for K = 1, softmax for K > 1.
        num_iterations: of Sinkhorn's algorithm, each scaling rows, then columns. With more than one process each
            communicates E numbers.
        temperature: smaller is nearer the best balanced assignment, and takes more iterations.
        capacity_factor, eval_capacity_factor, min_capacity, drop_by, stats_scope: see `TokenChoiceRouter`;
            "global": the plan is of the batch of all processes too.

    Raises:
        ValueError: an option that does not fit.
    """

    def __init__(
        self,
        d_model: int,
        num_experts: int,
        top_k: int = 1,
        *,
        score_function: str | None = None,
        num_iterations: int = 20,
        temperature: float = 1.0,
        **options: Unpack[TokenChoiceOptions],
    ) -> None:
        super().__init__(d_model, num_experts, top_k, **options)
        default = "sigmoid" if top_k == 1 else "softmax"
        self.score_function = check_choice("score_function", score_function or default, SCORE_FUNCTIONS)
        self.num_iterations = check_int("num_iterations", num_iterations, 1)
        self.temperature = check_number("temperature", temperature)
        if not temperature:
            raise ValueError(f"temperature must be above 0, got {temperature!r}")

    def forward(self, x_TD: Tensor, context: RoutingContext | None = None) -> Routing:
        context = context or RoutingContext()
        logits_TE = self.proj(x_TD)
        scores_TE = torch.softmax(logits_TE, dim=1) if self.score_function == "softmax" else logits_TE.sigmoid()
        wants_TE = logits_TE.detach()
        if self.training:
            wants_TE = wants_TE / self.temperature
            wants_TE = wants_TE + self._column_scale(wants_TE, context)
        expert_ids_TK = wants_TE.topk(self.top_k, dim=1).indices
        return self.routing(expert_ids_TK, scores_TE.gather(1, expert_ids_TK), context, scores_TE=scores_TE)

    def _column_scale(self, log_TE: Tensor, context: RoutingContext) -> Tensor:
        """Sinkhorn's v `(E,)`, up to a constant: neither that nor u, each the same for all experts, moves a choice."""
        mask_T, processes = context.token_mask_T, self.processes(context)
        log_scale_E = log_TE.new_zeros(self.num_experts)
        for _ in range(self.num_iterations):
            rows_TE = torch.log_softmax(log_TE + log_scale_E, dim=1) - log_scale_E
            if mask_T is not None:
                rows_TE = rows_TE.masked_fill(~mask_T.unsqueeze(1), -torch.inf)
            log_scale_E = -processes.gather(rows_TE.logsumexp(dim=0)).logsumexp(dim=0)
        return log_scale_E

    def extra_repr(self) -> str:
        return (
            f"{super().extra_repr()}, score_function={self.score_function!r}, num_iterations={self.num_iterations}, "
            f"temperature={self.temperature}"
        )
