"""The `torch` backend: PyTorch's own matrix products, with an autograd of our own that keeps little."""

from typing import Any

import torch
from torch import Tensor

from fastmoe.kernels.contract import Plan
from fastmoe.kernels.reference import accumulation_dtype, score_topk
from fastmoe.kernels.torch_ops import ops


class TorchBackend:
    """See `fastmoe.kernels` for each kernel's arguments."""

    name = "torch"
    optional = False

    def available(self) -> str | None:
        return None

    def refuses(self, op: str, x: Tensor, *more: Any) -> str | None:
        return None

    def plan(self, expert_ids_N: Tensor, num_experts: int) -> Plan:
        return Plan(*ops.plan(expert_ids_N, num_experts, self.name))

    def grouped_mm(self, rows_NI: Tensor, weight_EOI: Tensor, bias_EO: Tensor | None, offsets_E: Tensor) -> Tensor:
        return ops.grouped_mm(rows_NI, weight_EOI, bias_EO, offsets_E, self.name)

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
    ) -> Tensor:
        tensors = (x_TD, weights_N, w1, b1, w2, b2)
        keep = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
        rows = (token_ids_N, plan.order_N, plan.offsets_E)
        y_TD, _ = ops.expert_mlp(*tensors, *rows, activation, rows_per_token, self.name, keep)
        return y_TD

    def combine(self, rows_NO: Tensor, token_ids_N: Tensor, weights_N: Tensor, plan: Plan, num_tokens: int) -> Tensor:
        dtype = accumulation_dtype(rows_NO.dtype)
        positions_N = torch.arange(len(plan.order_N), device=rows_NO.device)
        routed_N1 = (positions_N < plan.offsets_E[-1]).unsqueeze(1)
        weight_N1 = torch.where(routed_N1, weights_N[plan.order_N].unsqueeze(1).to(dtype), 0)
        weighted_NO = torch.where(routed_N1, rows_NO.to(dtype), 0) * weight_N1
        y_TO = weighted_NO.new_zeros(num_tokens, rows_NO.shape[1])
        return y_TO.index_add(0, token_ids_N[plan.order_N], weighted_NO).to(rows_NO.dtype)

    def score_topk(
        self, logits_TE: Tensor, top_k: int, score_function: str, normalize: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        return score_topk(logits_TE, top_k, score_function, normalize)
