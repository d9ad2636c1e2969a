"""`Experts`: what the layer asks of its experts, whatever they are made of."""

from collections.abc import Callable
from typing import Any, TypeVar

from torch import Tensor, nn

from fastmoe import kernels
from fastmoe._processes import ALONE, Processes
from fastmoe.kernels import Plan

Answer = TypeVar("Answer")


class Experts(nn.Module):
    """Rows grouped by expert in, rows out; a subclass defines `forward(rows_ND, offsets_e)`.

    Attributes:
        num_experts: E, of the whole layer.
        held: the numbers of the experts in this process, e of them; all of them unless the layer is expert parallel.
        tp: the processes that share the hidden width of each expert.
    """

    def __init__(self, num_experts: int, backend: str = "auto") -> None:
        super().__init__()
        self.num_experts, self.held = num_experts, range(num_experts)
        self.backend = kernels.check_backend(backend)
        self.tp: Processes = ALONE

    def together(self, function: Callable[..., Answer], *args: Any) -> Answer:
        """Call a function that uses the experts, several times perhaps.

        FSDP gathers weights around calls of methods that it is told of: this is the one.
        """
        return function(*args)

    def mix(self, x_TD: Tensor, token_ids_N: Tensor, weights_N: Tensor, plan: Plan, rows_per_token: int) -> Tensor:
        """Each token's weighted sum of what the experts here make of it, `(T, O)`; see `fastmoe.dispatch.Compute`."""
        x_TD, weights_N = self.tp.copy(x_TD), self.tp.copy(weights_N)
        y_TO = self._mix(x_TD, token_ids_N, weights_N, plan, rows_per_token)
        return self.tp.sum_for_all(y_TO)

    def _mix(self, x_TD: Tensor, token_ids_N: Tensor, weights_N: Tensor, plan: Plan, rows_per_token: int) -> Tensor:
        rows_ND = x_TD.index_select(0, token_ids_N[plan.order_N])
        rows_NO = self(rows_ND, plan.offsets_E)
        return kernels.combine(rows_NO, token_ids_N, weights_N, plan, len(x_TD), backend=self.backend)

    def parameters_per_expert(self) -> list[int]:
        """How many parameters each expert has of its own."""
        raise NotImplementedError
