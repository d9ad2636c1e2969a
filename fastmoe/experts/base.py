"""`Experts`: what the layer asks of its experts, whatever they are made of."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fastmoe import kernels
from fastmoe._processes import ALONE, Processes
from fastmoe.kernels import Plan


class Experts(nn.Module):
    """Tokens in, sums of what experts make of them out.

    A subclass defines `compute(rows_ND, offsets_e)`: rows grouped by expert in, rows out.

    Attributes:
        num_experts: E, of the whole layer.
        held: the numbers of the experts in this process, e of them; all of them unless the layer is expert parallel.
        spread_over: how many processes the experts are spread over.
        tp: the processes that share the hidden width of each expert.
    """

    def __init__(self, num_experts: int, backend: str = "auto") -> None:
        super().__init__()
        self.num_experts, self.held, self.spread_over = num_experts, range(num_experts), 1
        self.backend = kernels.check_backend(backend)
        self.tp: Processes = ALONE

    def forward(self, x_TD: Tensor, run: Callable[..., tuple[Tensor, Tensor]], rows: Any) -> tuple[Tensor, Tensor]:
        """What a dispatcher's `run` makes of tokens and routed rows with these experts.

        All use of the weights is inside, for what hooks into a module's forward: FSDP, adapters, offloading.
        """
        return run(self.cast(x_TD), rows, self.mix)

    def cast(self, x_TD: Tensor) -> Tensor:
        """Tokens in the dtype that the experts compute in, so that no more bytes travel than they read."""
        return x_TD

    def mix(self, x_TD: Tensor, token_ids_N: Tensor, weights_N: Tensor, plan: Plan, rows_per_token: int) -> Tensor:
        """Each token's weighted sum of what the experts here make of it, `(T, O)`; see `fastmoe.dispatch.Compute`.

        A process that holds no expert is sent no row, and answers none, `(0, D)`.
        """
        if not self.held:
            return ZeroGrad.apply(x_TD, *(p for p in self.parameters() if local(p).numel()))
        x_TD, weights_N = self.tp.copy(x_TD), self.tp.copy(weights_N)
        y_TO = self.mix_here(x_TD, token_ids_N, weights_N, plan, rows_per_token)
        return self.tp.sum_for_all(y_TO)

    def mix_here(self, x_TD: Tensor, token_ids_N: Tensor, weights_N: Tensor, plan: Plan, rows_per_token: int) -> Tensor:
        """As `mix`, of the hidden width that is here: this process's share of the sum."""
        rows_ND = x_TD.index_select(0, token_ids_N[plan.order_N])
        rows_NO = self.compute(rows_ND, plan.offsets_E)
        return kernels.combine(rows_NO, token_ids_N, weights_N, plan, len(x_TD), backend=self.backend)

    def compute(self, rows_ND: Tensor, offsets_E: Tensor) -> Tensor:
        """Rows sorted by expert in, rows out, `(N, O)`; rows past the last offset give zeros."""
        raise NotImplementedError

    def parameters_per_expert(self) -> list[int]:
        """How many parameters each of the E experts has of its own."""
        raise NotImplementedError

    def total_parameters(self) -> int:
        """How many parameters all E experts have together; those that several share count once."""
        raise NotImplementedError


def local(tensor: Tensor) -> Tensor:
    """This process's part of a DTensor; any other tensor as it is."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


class ZeroGrad(torch.autograd.Function):
    """The identity on rows, with zero as the gradient of each parameter: an unused expert has zeros, not None.

    An optimizer or a gradient all-reduce then sees the same parameters in every process and every step.
    """

    @staticmethod
    def forward(rows_NO: Tensor, *params: Tensor) -> Tensor:
        return rows_NO.view_as(rows_NO)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
        ctx.save_for_backward(*inputs[1:])

    @staticmethod
    def backward(ctx, grad_NO: Tensor):  # type: ignore[no-untyped-def]
        return grad_NO, *(torch.zeros_like(param) for param in ctx.saved_tensors)
