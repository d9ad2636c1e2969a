"""Where routed rows go to be computed, and the dispatcher of one process: a permutation, nothing travels."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fastmoe import kernels
from fastmoe.kernels import Plan

# (x_TD, token_ids_N, weights_N, plan, rows_per_token) -> each token's weighted sum of what the experts here make of it
Compute = Callable[[Tensor, Tensor, Tensor, Plan, int], Tensor]


@dataclass(frozen=True)
class RoutedRows:
    """Which tokens go to which experts, as in a `Routing`.

    Attributes:
        token_ids_N: int64, the token of each row.
        expert_ids_N: int64, its expert in the whole layer; -1 goes nowhere.
        weights_N: floating, the weight of the expert's output in the token's sum.
        rows_per_token: K if rows stand token by token, K for each; else 0.
    """

    token_ids_N: Tensor
    expert_ids_N: Tensor
    weights_N: Tensor
    rows_per_token: int = 0

    @classmethod
    def one_each(cls, expert_ids_T: Tensor, dtype: torch.dtype) -> "RoutedRows":
        """Every token goes to one expert, with weight 1; `dtype` is that of the tokens."""
        token_ids_T = torch.arange(len(expert_ids_T), device=expert_ids_T.device)
        ones_T = torch.ones_like(expert_ids_T, dtype=kernels.accumulation_dtype(dtype))
        return cls(token_ids_T, expert_ids_T, ones_T, 1)


class LocalDispatcher:
    """Every expert lives in this process."""

    def __init__(self, num_experts: int, backend: str = "auto", name: str = "") -> None:
        self.num_experts, self.backend, self.name = num_experts, backend, name

    def run(self, x_TD: Tensor, rows: RoutedRows, compute: Compute) -> tuple[Tensor, Tensor]:
        """`(T, O)`, each token's weighted sum, and where each expert's rows ended, int32 `(E,)`."""
        plan = kernels.plan(rows.expert_ids_N, self.num_experts, backend=self.backend)
        return compute(x_TD, rows.token_ids_N, rows.weights_N, plan, rows.rows_per_token), plan.offsets_E

    def place(self, *, routed: bool = True) -> str:
        """Words for an error: which layer."""
        return f"MoE layer {self.name!r}"
