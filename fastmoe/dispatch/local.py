"""Dispatch within one process: a permutation."""

from dataclasses import dataclass

from torch import Tensor

from fastmoe import kernels
from fastmoe.kernels import Plan


@dataclass(frozen=True)
class Dispatched:
    """Rows where their experts live, and what is needed to bring results back.

    Attributes:
        rows_RD: rows sorted by expert.
        offsets_e: int32, where each expert's rows end.
        plan: the plan that sorted them.
        token_ids_N, weights_N: of the routed rows, in the router's order.
        num_tokens: T.
    """

    rows_RD: Tensor
    offsets_e: Tensor
    plan: Plan
    token_ids_N: Tensor
    weights_N: Tensor
    num_tokens: int


class LocalDispatcher:
    """Every expert lives in this process. Dropped rows come last and are computed by none."""

    def __init__(self, backend: str = "auto") -> None:
        self.backend = backend

    def dispatch(self, x_TD: Tensor, token_ids_N: Tensor, weights_N: Tensor, plan: Plan) -> Dispatched:
        rows_RD = x_TD.index_select(0, token_ids_N[plan.order_N])
        return Dispatched(rows_RD, plan.offsets_E, plan, token_ids_N, weights_N, len(x_TD))

    def combine(self, rows_RO: Tensor, sent: Dispatched) -> Tensor:
        """Weighted sum of each token's rows, `(T, O)`."""
        return kernels.combine(
            rows_RO, sent.token_ids_N, sent.weights_N, sent.plan, sent.num_tokens, backend=self.backend
        )
