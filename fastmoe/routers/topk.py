"""Scores for all experts, then the K best."""

from typing import Unpack

import torch
import torch.nn.functional as F
from torch import Tensor

from fastmoe import kernels
from fastmoe._errors import check_choice, check_number, unknown_name
from fastmoe.kernels import sigmoid_shares
from fastmoe.routers.base import register_router
from fastmoe.routers.context import RoutingContext
from fastmoe.routers.groups import check_groups, limit_to_groups
from fastmoe.routers.losses import load_balance_loss, z_loss
from fastmoe.routers.routing import Routing
from fastmoe.routers.token_choice import TokenChoiceOptions, TokenChoiceRouter

SCORE_FUNCTIONS = ("softmax", "sigmoid")


@register_router("topk")
class TopKRouter(TokenChoiceRouter):
    """`s = softmax(W x)` or `sigmoid(W x)`; each token goes to the K experts of largest s.

    Args:
        d_model, num_experts, top_k: D, E, K.
        score_function: "softmax" or "sigmoid".
        score_after: the score function is applied to the K chosen logits alone, after selection.
        normalize: True: weights are s divided by their sum over the K chosen. False: weights are s. The default is
            True for K > 1 and False for K = 1, where a normalised weight would be constant 1 and teach the router
            nothing. "stop_gradient": divided by their sum, the sum taken as a constant in backward, so that weights
            sum to 1 and the router learns even for K = 1; upcycling uses it there.
        scale: every weight is multiplied by it.
        num_groups, top_groups: a token's experts come from its best `top_groups` of `num_groups` equal groups, by the
            sum of each group's two best scores.
        aux_loss_weight: weight of the load-balance loss, `fastmoe.routers.load_balance_loss`; sigmoid scores are
            divided by their sum over all experts for it.
        z_loss_weight: weight of the z-loss, `fastmoe.routers.z_loss`.
        capacity_factor, eval_capacity_factor, min_capacity, drop_by, stats_scope: see `TokenChoiceRouter`.

    Raises:
        ValueError: an option that does not fit; `score_after` with softmax and K = 1, a weight of constant 1.
    """

    def __init__(
        self,
        d_model: int,
        num_experts: int,
        top_k: int = 2,
        *,
        score_function: str = "softmax",
        score_after: bool = False,
        normalize: bool | str | None = None,
        scale: float = 1.0,
        num_groups: int = 1,
        top_groups: int = 1,
        aux_loss_weight: float = 0.01,
        z_loss_weight: float = 0.0,
        **options: Unpack[TokenChoiceOptions],
    ) -> None:
        super().__init__(d_model, num_experts, top_k, **options)
        self.score_function = check_choice("score_function", score_function, SCORE_FUNCTIONS)
        if normalize not in (None, True, False, "stop_gradient"):
            raise unknown_name("normalize", normalize, ["True", "False", "stop_gradient"])
        if score_after and score_function == "softmax" and top_k == 1:
            raise ValueError("softmax over one chosen expert is always 1: with top_k=1 leave score_after out")
        self.score_after = score_after
        self.normalize = top_k > 1 if normalize is None else normalize
        self.scale = check_number("scale", scale)
        check_groups(num_groups, top_groups, num_experts, top_k)
        self.num_groups, self.top_groups = num_groups, top_groups
        self.aux_loss_weight = check_number("aux_loss_weight", aux_loss_weight)
        self.z_loss_weight = check_number("z_loss_weight", z_loss_weight)

    def forward(self, x_TD: Tensor, context: RoutingContext | None = None) -> Routing:
        context = context or RoutingContext()
        logits_TE = self.proj(x_TD)
        if self._plain:
            scores_TE, weights_TK, expert_ids_TK = kernels.score_topk(
                logits_TE, self.top_k, self.score_function, normalize=bool(self.normalize), backend=context.backend
            )
            losses = self._losses(logits_TE, scores_TE, expert_ids_TK, context)
            return self.routing(expert_ids_TK, weights_TK * self.scale, context, losses, scores_TE)
        scores_TE = torch.softmax(logits_TE, dim=1) if self.score_function == "softmax" else logits_TE.sigmoid()
        selection_TE = limit_to_groups(scores_TE, self.num_groups, self.top_groups)
        weights_TK, expert_ids_TK = selection_TE.topk(self.top_k, dim=1)
        losses = self._losses(logits_TE, scores_TE, expert_ids_TK, context)
        if self.score_after and self.score_function == "softmax":
            weights_TK = torch.softmax(logits_TE.gather(1, expert_ids_TK), dim=1)
        elif self.normalize is not False:
            weights_TK = self._shares(weights_TK, logits_TE.gather(1, expert_ids_TK))
        return self.routing(expert_ids_TK, weights_TK * self.scale, context, losses, scores_TE)

    @property
    def _plain(self) -> bool:
        """Whether the options are those that one kernel knows."""
        after = self.score_after and self.score_function == "softmax"
        return self.num_groups == 1 and not after and self.normalize != "stop_gradient"

    def _shares(self, weights_TK: Tensor, logits_TK: Tensor) -> Tensor:
        """The weights over their sum; from the logits where they are sigmoids, whose sum may be 0."""
        total_T1 = weights_TK.sum(dim=1, keepdim=True)
        shares_TK = weights_TK / total_T1 if self.score_function == "softmax" else sigmoid_shares(logits_TK)
        if self.normalize != "stop_gradient":
            return shares_TK
        if self.score_function == "softmax":
            return weights_TK / total_T1.detach()
        log_TK = F.logsigmoid(logits_TK)
        return shares_TK.detach() * (log_TK - log_TK.detach()).exp()

    def _losses(
        self, logits_TE: Tensor, scores_TE: Tensor, expert_ids_TK: Tensor, context: RoutingContext
    ) -> dict[str, Tensor]:
        losses = {}
        mask_T, processes = context.token_mask_T, self.processes(context)
        if self.aux_loss_weight:
            softmax = self.score_function == "softmax"
            probs_TE = scores_TE if softmax else sigmoid_shares(logits_TE)
            loss = load_balance_loss(probs_TE, expert_ids_TK, mask_T, processes)
            losses["load_balance"] = self.aux_loss_weight * loss
        if self.z_loss_weight:
            losses["z"] = self.z_loss_weight * z_loss(logits_TE, mask_T, processes)
        return losses

    def extra_repr(self) -> str:
        return (
            f"{super().extra_repr()}, score_function={self.score_function!r}, normalize={self.normalize}, "
            f"aux_loss_weight={self.aux_loss_weight}, z_loss_weight={self.z_loss_weight}"
        )
