"""What every backend is given and must give back.

Shapes: T tokens, D model width, H expert hidden width, E experts, N routed rows (dropped ones included),
I and O the input and output width of one matrix.
"""

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor


@dataclass(frozen=True)
class Plan:
    """Where each routed row stands once rows are sorted by expert.

    Attributes:
        order_N: int64; `order_N[i]` is the row at sorted position i. Stable: rows of one expert keep their order.
            Rows with expert id -1 (dropped or masked) come last.
        offsets_E: int32; expert e owns sorted positions `offsets_E[e - 1]` to `offsets_E[e]`. The last entry is the
            number of rows that are computed.
    """

    order_N: Tensor
    offsets_E: Tensor

    @property
    def counts_E(self) -> Tensor:
        """Rows of each expert, int32."""
        return torch.diff(self.offsets_E, prepend=self.offsets_E.new_zeros(1))


class Backend(Protocol):
    """One implementation of the kernels. `fastmoe.kernels` checks arguments before it calls one."""

    name: str
    optional: bool  # an addition that a machine may well lack: going on without it is no warning

    def available(self) -> str | None:
        """None if this backend can run on this machine, else the reason why not."""
        ...

    def refuses(self, op: str, x: Tensor, *more: Any) -> str | None:
        """None if this backend can serve kernel `op` on tensors like `x`, else the reason why not.

        `more`: for `plan` E, for `score_topk` K, for `grouped_mm` the weight, for `expert_mlp` w1 and w2.
        """
        ...

    def plan(self, expert_ids_N: Tensor, num_experts: int) -> Plan: ...

    def grouped_mm(self, rows_NI: Tensor, weight_EOI: Tensor, bias_EO: Tensor | None, offsets_E: Tensor) -> Tensor: ...

    def expert_mlp(
        self,
        x_TD: Tensor,
        token_ids_N: Tensor,
        weights_N: Tensor,
        plan: Plan,
        w1: Tensor,
        b1: Tensor | None,
        w2: Tensor,
        b2: Tensor | None,
        activation: str,
        rows_per_token: int,
    ) -> Tensor: ...

    def combine(
        self, rows_NO: Tensor, token_ids_N: Tensor, weights_N: Tensor, plan: Plan, num_tokens: int
    ) -> Tensor: ...

    def score_topk(
        self, logits_TE: Tensor, top_k: int, score_function: str, normalize: bool
    ) -> tuple[Tensor, Tensor, Tensor]: ...


def ids_out_of_range(expert_ids_N: Tensor, num_experts: int) -> ValueError:
    """The error for expert ids that name no expert."""
    low, high = int(expert_ids_N.min()), int(expert_ids_N.max())
    return ValueError(
        f"expert ids must lie in 0..{num_experts - 1}, or be -1 for a dropped row; the router gave {low}..{high}"
    )
