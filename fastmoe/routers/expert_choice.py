"""Expert choice: every expert takes its best tokens, so that the load is even."""

import torch
from torch import Tensor

from fastmoe._errors import check_choice, check_number
from fastmoe.routers.base import Router, register_router
from fastmoe.routers.capacity import expert_capacity
from fastmoe.routers.context import RoutingContext
from fastmoe.routers.routing import Routing
from fastmoe.routers.token_choice import SCOPES


@register_router("expert_choice")
class ExpertChoiceRouter(Router):
    """`s = softmax(W x)` over the experts; each expert takes the `C = ceil(capacity_factor * T * K / E)` tokens of
    largest s, with weight s; of equal ones the earlier. A token may get any number of experts, none included.

    Zhou et al. 2022 (2202.09368), section 3.2, whose capacity factor c is K * capacity_factor. There is nothing to
    balance, hence no loss.

    An expert compares tokens of the whole sequence and the whole batch, so in a causal model it leaks the future, and
    the answer for one token depends on the others of the batch, in evaluation too.

    Args:
        d_model, num_experts: D, E.
        top_k: K, experts per token on average where capacity_factor is 1.
        capacity_factor: an expert takes at most all tokens, however large.
        stats_scope: in training, "global": experts choose among the tokens of all processes; "local": among each
            process's.

    Raises:
        ValueError: an option that does not fit.
    """

    takes_context = True

    def __init__(
        self,
        d_model: int,
        num_experts: int,
        top_k: int = 2,
        *,
        capacity_factor: float = 1.0,
        stats_scope: str = "global",
    ) -> None:
        super().__init__(d_model, num_experts, top_k)
        self.capacity_factor = check_number("capacity_factor", capacity_factor)
        if not capacity_factor:
            raise ValueError(f"capacity_factor must be above 0, got {capacity_factor!r}")
        self.stats_scope = check_choice("stats_scope", stats_scope, SCOPES)

    @property
    def causal(self) -> bool:
        """False."""
        return False

    def forward(self, x_TD: Tensor, context: RoutingContext | None = None) -> Routing:
        context = context or RoutingContext()
        scores_TE = torch.softmax(self.proj(x_TD), dim=1)
        token_ids_EC, taken_EC = self._choose(scores_TE.detach(), context)
        expert_ids_E1 = torch.arange(self.num_experts, device=x_TD.device).unsqueeze(1)
        return Routing(
            token_ids_N=token_ids_EC.reshape(-1),
            expert_ids_N=torch.where(taken_EC, expert_ids_E1, -1).reshape(-1),
            weights_N=scores_TE.t().gather(1, token_ids_EC).reshape(-1),
            num_tokens=len(x_TD),
            num_experts=self.num_experts,
            scores_TE=scores_TE,
        )

    def _choose(self, scores_TE: Tensor, context: RoutingContext) -> tuple[Tensor, Tensor]:
        """This process's best tokens of each expert, `(E, C)` with a C that knows no padding, and which it takes."""
        mask_T = context.token_mask_T
        keys_TE = scores_TE if mask_T is None else scores_TE.masked_fill(~mask_T.unsqueeze(1), -1)
        processes = self.processes(context)
        keys_GE, mine = processes.gather_rows(keys_TE)
        order_EG = keys_GE.t().argsort(dim=1, descending=True, stable=True)
        most = min(int(self._capacity(len(keys_GE))), len(keys_TE))
        if processes.size == 1:
            token_ids_EC = order_EG[:, :most]
            places_EC = torch.arange(most, device=order_EG.device).expand_as(token_ids_EC)
        else:
            places_ET = order_EG.argsort(dim=1)[:, mine]
            places_EC, token_ids_EC = (sorted_ET[:, :most] for sorted_ET in places_ET.sort(dim=1))
        counted_GE = keys_GE != -1
        taken_EC = places_EC < self._capacity(counted_GE[:, 0].sum())
        return token_ids_EC, taken_EC & counted_GE[mine].t().gather(1, token_ids_EC)

    def _capacity(self, num_tokens: int | Tensor) -> int | Tensor:
        return expert_capacity(num_tokens, self.num_experts, self.top_k, self.capacity_factor)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, capacity_factor={self.capacity_factor}"
