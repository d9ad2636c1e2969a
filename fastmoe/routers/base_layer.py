"""BASE layers: in training tokens are assigned to experts so that every expert gets as many."""

import dataclasses

import torch
from torch import Tensor, nn

from fastmoe._errors import check_choice
from fastmoe.routers.auction import balanced_assignment
from fastmoe.routers.base import Router, register_router
from fastmoe.routers.context import RoutingContext
from fastmoe.routers.routing import Routing
from fastmoe.routers.token_choice import SCOPES


@register_router("base")
class BaseLayerRouter(Router):
    """One expert per token. In training the balanced assignment of largest `sum_t w_a(t) . x_t`; in evaluation each
    token's best expert. The weight is `sigmoid(w_a(t) . x_t)`; no gradient goes through the assignment.

    BASE layers, Lewis et al. 2021 (2103.16716), sections 3.1 and 3.2. Every expert gets T/E of the tokens that count,
    rounded up or down, so there is no balance loss and no capacity. The sum is the largest up to a small bound, see
    `fastmoe.routers.auction`. The auction waits for the device in every one of some hundred rounds, padding once more.

    Args:
        d_model, num_experts: D, E.
        top_k: 1.
        stats_scope: in training, "global": the tokens of all processes are assigned together, the whole problem solved
            on each of them; "local": those of each process by themselves.

    Parameters:
        proj.weight: the experts' embeddings, starting orthogonal with gain 0.1, as in the authors' code.

    Raises:
        ValueError: a `top_k` other than 1; an option that does not fit.
    """

    takes_context = True
    own_init = True

    def __init__(self, d_model: int, num_experts: int, top_k: int = 1, *, stats_scope: str = "global") -> None:
        if top_k != 1:
            raise ValueError(
                f"router 'base' sends each token to one expert: give top_k=1 (the default of fastmoe.MoE is 2), "
                f"got top_k={top_k!r}"
            )
        super().__init__(d_model, num_experts, top_k)
        self.stats_scope = check_choice("stats_scope", stats_scope, SCOPES)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the experts' embeddings anew."""
        weight_ED = self.proj.weight
        start_ED = torch.empty(weight_ED.shape, dtype=torch.float32, device=weight_ED.device)
        nn.init.orthogonal_(start_ED, gain=0.1)  # has no half precision
        if hasattr(weight_ED, "device_mesh"):
            from torch.distributed.tensor import DTensor, distribute_tensor  # slow to import

            assert isinstance(weight_ED, DTensor)
            start_ED = distribute_tensor(start_ED, weight_ED.device_mesh, weight_ED.placements)
        with torch.no_grad():
            weight_ED.copy_(start_ED)

    def forward(self, x_TD: Tensor, context: RoutingContext | None = None) -> Routing:
        context = context or RoutingContext()
        logits_TE = self.proj(x_TD)
        scores_TE, mask_T = logits_TE.sigmoid(), context.token_mask_T
        if self.training:
            expert_ids_T = self._assign(logits_TE.detach(), context)
        else:
            expert_ids_T = logits_TE.argmax(dim=1)
            expert_ids_T = expert_ids_T if mask_T is None else torch.where(mask_T, expert_ids_T, -1)
        expert_ids_T1 = expert_ids_T.unsqueeze(1)
        weights_T1 = scores_TE.gather(1, expert_ids_T1.clamp(min=0))
        found = Routing.from_topk(expert_ids_T1, weights_T1, self.num_experts, scores=scores_TE)
        return dataclasses.replace(found, dropped=0)

    def _assign(self, logits_TE: Tensor, context: RoutingContext) -> Tensor:
        """Each token's expert, -1 for padding."""
        mask_T = context.token_mask_T
        counted_UE = logits_TE if mask_T is None else logits_TE[mask_T.nonzero().flatten()]
        logits_GE, mine = self.processes(context).gather_rows(counted_UE)
        expert_ids_U = balanced_assignment(logits_GE)[mine]
        if mask_T is None:
            return expert_ids_U
        return torch.full_like(mask_T, -1, dtype=torch.int64).masked_scatter(mask_T, expert_ids_U)
