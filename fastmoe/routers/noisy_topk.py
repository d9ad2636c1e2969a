"""Noisy top-k gating: learned noise on the logits in training, then the K best."""

from typing import Unpack

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastmoe._errors import check_number
from fastmoe.routers import noise
from fastmoe.routers.base import RouterLinear, register_router
from fastmoe.routers.context import RoutingContext
from fastmoe.routers.losses import cv_squared
from fastmoe.routers.routing import Routing
from fastmoe.routers.token_choice import TokenChoiceOptions, TokenChoiceRouter


@register_router("noisy_topk")
class NoisyTopKRouter(TokenChoiceRouter):
    """`H = W x + N(0, 1) * softplus(W_noise x)`, the noise in training only; the K best, softmax over those K.

    Shazeer et al. 2017 (1701.06538), section 2.1 and appendix A. With K = 1 the weight is the probability of the
    softmax over all E experts, as one over a single expert is always 1. Both matrices start at zero (appendix A).

    Args:
        d_model, num_experts, top_k: D, E, K.
        importance_loss_weight: weight of `cv_squared` of each expert's sum of weights (equation 7).
        load_loss_weight: weight of `cv_squared` of each expert's expected number of tokens under new noise
            (equation 11), in training only.
        capacity_factor, eval_capacity_factor, min_capacity, drop_by, stats_scope: see `TokenChoiceRouter`.

    Raises:
        ValueError: an option that does not fit.
    """

    own_init = True

    def __init__(
        self,
        d_model: int,
        num_experts: int,
        top_k: int = 2,
        *,
        importance_loss_weight: float = 0.1,
        load_loss_weight: float = 0.1,
        **options: Unpack[TokenChoiceOptions],
    ) -> None:
        super().__init__(d_model, num_experts, top_k, **options)
        self.noise = RouterLinear(d_model, num_experts)
        self.importance_loss_weight = check_number("importance_loss_weight", importance_loss_weight)
        self.load_loss_weight = check_number("load_loss_weight", load_loss_weight)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set both matrices to zero, so that every expert begins with the same load (appendix A)."""
        nn.init.zeros_(self.proj.weight)
        nn.init.zeros_(self.noise.weight)

    def forward(self, x_TD: Tensor, context: RoutingContext | None = None) -> Routing:
        context = context or RoutingContext()
        clean_TE = self.proj(x_TD)
        noisy_TE, std_TE = clean_TE, None
        if self.training:
            std_TE = self._std(x_TD)
            noisy_TE = clean_TE + noise.normal(clean_TE) * std_TE
        top_TK, expert_ids_TK = noisy_TE.topk(self.top_k, dim=1)
        scores_TE = torch.softmax(noisy_TE, dim=1)
        weights_TK = scores_TE.gather(1, expert_ids_TK) if self.top_k == 1 else torch.softmax(top_TK, dim=1)
        losses = {}
        if self.importance_loss_weight:
            gates_TE = torch.zeros_like(scores_TE).scatter(1, expert_ids_TK, weights_TK)
            losses["importance"] = self.importance_loss_weight * self._imbalance(gates_TE, context)
        if self.load_loss_weight and std_TE is not None:
            chance_TE = chance_of_choice(clean_TE, noisy_TE, std_TE, self.top_k)
            losses["load"] = self.load_loss_weight * self._imbalance(chance_TE, context)
        return self.routing(expert_ids_TK, weights_TK, context, losses, scores_TE)

    def _std(self, x_TD: Tensor) -> Tensor:
        """The noise's standard deviation; never so small that the load's quotient overflows."""
        std_TE = F.softplus(self.noise(x_TD))
        return std_TE.clamp(min=torch.finfo(std_TE.dtype).eps)

    def _imbalance(self, load_TE: Tensor, context: RoutingContext) -> Tensor:
        counted_T1 = context.counted(load_TE).unsqueeze(1)
        return cv_squared(self.processes(context).sum_for_loss((load_TE * counted_T1).sum(0)))


def chance_of_choice(clean_TE: Tensor, noisy_TE: Tensor, std_TE: Tensor, top_k: int) -> Tensor:
    """P(x, i): how likely expert i is among the K best if its noise alone were drawn anew; `(T, E)`, with gradient.

    Shazeer et al. 2017 (1701.06538), appendix A, equations 8 and 9: i must exceed the k-th best of the others.
    """
    if top_k == clean_TE.shape[1]:
        return torch.ones_like(clean_TE)
    top_TK1, ids_TK1 = noisy_TE.topk(top_k + 1, dim=1)
    chosen_TE = torch.zeros_like(noisy_TE, dtype=torch.bool).scatter(1, ids_TK1[:, :top_k], True)
    kth_of_others_TE = torch.where(chosen_TE, top_TK1[:, top_k:], top_TK1[:, top_k - 1 : top_k])
    return torch.special.ndtr((clean_TE - kth_of_others_TE) / std_TE)
