"""Softmax over all experts, then the K best."""

import math

import torch
from torch import Tensor

from fastmoe._errors import unknown_name
from fastmoe.routers.base import Router, register_router
from fastmoe.routers.losses import load_balance_loss, z_loss
from fastmoe.routers.routing import Routing


@register_router("topk")
class TopKRouter(Router):
    """`p = softmax(W x)`; each token goes to the K experts of largest p.

    Args:
        d_model, num_experts, top_k: D, E, K.
        normalize: True: weights are p divided by their sum over the K chosen. False: weights are p. The default is
            True for K > 1 and False for K = 1, where a normalised weight would be constant 1 and teach the router
            nothing. "stop_gradient": divided by their sum, the sum taken as a constant in backward, so that weights
            sum to 1 and the router learns even for K = 1; upcycling uses it there.
        aux_loss_weight: weight of the load-balance loss, `fastmoe.routers.load_balance_loss`.
        z_loss_weight: weight of the z-loss, `fastmoe.routers.z_loss`.

    Raises:
        ValueError: `top_k` above `num_experts`, a negative or non-finite loss weight, an unknown `normalize`.
    """

    takes_token_mask = True

    def __init__(
        self,
        d_model: int,
        num_experts: int,
        top_k: int = 2,
        *,
        normalize: bool | str | None = None,
        aux_loss_weight: float = 0.01,
        z_loss_weight: float = 0.0,
    ) -> None:
        super().__init__(d_model, num_experts, top_k)
        if normalize not in (None, True, False, "stop_gradient"):
            raise unknown_name("normalize", normalize, ["True", "False", "stop_gradient"])
        self.normalize = top_k > 1 if normalize is None else normalize
        self.aux_loss_weight = _check_weight("aux_loss_weight", aux_loss_weight)
        self.z_loss_weight = _check_weight("z_loss_weight", z_loss_weight)

    def forward(self, x_TD: Tensor, token_mask_T: Tensor | None = None) -> Routing:
        logits_TE = self.proj(x_TD)
        probs_TE = torch.softmax(logits_TE, dim=1)
        weights_TK, expert_ids_TK = probs_TE.topk(self.top_k, dim=1)
        losses = self._losses(logits_TE, probs_TE, expert_ids_TK, token_mask_T)
        return Routing.from_topk(expert_ids_TK, self._normalized(weights_TK), self.num_experts, losses, probs_TE)

    def _normalized(self, weights_TK: Tensor) -> Tensor:
        if self.normalize is False:
            return weights_TK
        total_T1 = weights_TK.sum(dim=1, keepdim=True)
        return weights_TK / (total_T1.detach() if self.normalize == "stop_gradient" else total_T1)

    def _losses(
        self, logits_TE: Tensor, probs_TE: Tensor, expert_ids_TK: Tensor, token_mask_T: Tensor | None
    ) -> dict[str, Tensor]:
        losses = {}
        if self.aux_loss_weight:
            losses["load_balance"] = self.aux_loss_weight * load_balance_loss(probs_TE, expert_ids_TK, token_mask_T)
        if self.z_loss_weight:
            losses["z"] = self.z_loss_weight * z_loss(logits_TE, token_mask_T)
        return losses

    def extra_repr(self) -> str:
        return (
            f"{super().extra_repr()}, normalize={self.normalize}, "
            f"aux_loss_weight={self.aux_loss_weight}, z_loss_weight={self.z_loss_weight}"
        )


def _check_weight(name: str, value: float) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < math.inf:
        raise ValueError(f"{name} must be a finite number >= 0, got {value!r}")
    return float(value)
