"""Switch routing: one expert per token, jitter on the router's input in training."""

from typing import Unpack

import torch
from torch import Tensor

from fastmoe._errors import check_number
from fastmoe.routers import noise
from fastmoe.routers.base import register_router
from fastmoe.routers.context import RoutingContext
from fastmoe.routers.losses import load_balance_loss, z_loss
from fastmoe.routers.routing import Routing
from fastmoe.routers.token_choice import TokenChoiceOptions, TokenChoiceRouter


@register_router("switch")
class SwitchRouter(TokenChoiceRouter):
    """`p = softmax(W x)`; each token goes to the expert of largest p, with weight p.

    Fedus et al. 2021 (2101.03961), section 2.2.

    Args:
        d_model, num_experts: D, E.
        top_k: 1.
        jitter: in training what the router sees of x is multiplied, element by element, by numbers uniform in
            [1 - jitter, 1 + jitter].
        aux_loss_weight: weight of the load-balance loss, `fastmoe.routers.load_balance_loss`.
        z_loss_weight: weight of the z-loss, `fastmoe.routers.z_loss`.
        capacity_factor: 1.25 unless given; in evaluation 2.0.
        eval_capacity_factor, min_capacity, drop_by, stats_scope: see `TokenChoiceRouter`.

    Raises:
        ValueError: a `top_k` other than 1; `jitter` of 1 or more; an option that does not fit.
    """

    def __init__(
        self,
        d_model: int,
        num_experts: int,
        top_k: int = 1,
        *,
        jitter: float = 0.01,
        aux_loss_weight: float = 0.01,
        z_loss_weight: float = 0.0,
        **options: Unpack[TokenChoiceOptions],
    ) -> None:
        if top_k != 1:
            raise ValueError(
                f"router 'switch' sends each token to one expert: give top_k=1 (the default of fastmoe.MoE is 2), "
                f"got top_k={top_k!r}"
            )
        given: TokenChoiceOptions = {"capacity_factor": 1.25, "eval_capacity_factor": 2.0, **options}
        super().__init__(d_model, num_experts, top_k, **given)
        self.jitter = check_number("jitter", jitter)
        if jitter >= 1:
            raise ValueError(f"jitter must be below 1, got {jitter!r}")
        self.aux_loss_weight = check_number("aux_loss_weight", aux_loss_weight)
        self.z_loss_weight = check_number("z_loss_weight", z_loss_weight)

    def forward(self, x_TD: Tensor, context: RoutingContext | None = None) -> Routing:
        context = context or RoutingContext()
        logits_TE = self.proj(self._jittered(x_TD))
        scores_TE = torch.softmax(logits_TE, dim=1)
        weights_T1, expert_ids_T1 = scores_TE.max(dim=1, keepdim=True)
        losses, mask_T, processes = {}, context.token_mask_T, self.processes(context)
        if self.aux_loss_weight:
            loss = load_balance_loss(scores_TE, expert_ids_T1, mask_T, processes)
            losses["load_balance"] = self.aux_loss_weight * loss
        if self.z_loss_weight:
            losses["z"] = self.z_loss_weight * z_loss(logits_TE, mask_T, processes)
        return self.routing(expert_ids_T1, weights_T1, context, losses, scores_TE)

    def _jittered(self, x_TD: Tensor) -> Tensor:
        if not (self.training and self.jitter):
            return x_TD
        x_TD = x_TD.to(torch.promote_types(x_TD.dtype, torch.float32))  # bfloat16 knows three numbers in 1 ± 0.01
        return x_TD * (1 + self.jitter * (2 * noise.uniform(x_TD) - 1))
