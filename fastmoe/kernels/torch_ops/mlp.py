"""The whole routed MLP, forward and backward, over a layout.

Forward keeps the input and the pre-activation `(N, H)`, gated `(N, 2H)`; backward gathers the rows and activates
anew. The gradient of the routing weights needs no second product: with h the hidden activations and g the gradient
of a token's output, `<h @ w2.T + b2, g> = <h, g @ w2> + <b2, g>`, and `g @ w2` is computed anyway.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from fastmoe.kernels.activations import activate, activate_, activate_backward
from fastmoe.kernels.reference import accumulation_dtype
from fastmoe.kernels.torch_ops.layout import Layout, choose_layout


@dataclass(frozen=True)
class Experts:
    """Stacked weights: `w1 (E, H, D)`, gated `(E, 2H, D)`; `b1`; `w2 (E, D, H)`; `b2`; the activation's name."""

    w1: Tensor
    b1: Tensor | None
    w2: Tensor
    b2: Tensor | None
    activation: str


@dataclass(frozen=True)
class Route:
    """Routed rows in sorted order: `token_N` and `weight_N1` of each, its layout, and the original order."""

    token_N: Tensor
    weight_N1: Tensor
    order_N: Tensor
    layout: Layout
    num_tokens: int
    rows_per_token: int

    @classmethod
    def build(
        cls,
        x_TD: Tensor,
        token_ids_N: Tensor,
        weights_N: Tensor,
        order_N: Tensor,
        offsets_E: Tensor,
        w1: Tensor,
        rows_per_token: int,
    ) -> "Route":
        layout = choose_layout(len(order_N), offsets_E, w1)
        weight_N1 = layout.take(layout.put(weights_N[order_N].unsqueeze(1)))
        return cls(token_ids_N[order_N], weight_N1, order_N, layout, len(x_TD), rows_per_token)

    def gather(self, x_TD: Tensor) -> Tensor:
        """Each token's row, once for each slot that it fills: `(S, D)`."""
        return self.layout.put(x_TD.index_select(0, self.token_N))

    def scatter_sum(self, slots_SD: Tensor, weighted: bool) -> Tensor:
        """Sum over each token's slots, weighted or not: `(T, D)`."""
        rows_ND = self.layout.take(slots_SD)
        if self.rows_per_token and rows_ND.device.type == "cpu":
            return self._bag_sum(rows_ND, weighted)
        dtype = accumulation_dtype(rows_ND.dtype)
        rows_ND = rows_ND.to(dtype)
        if weighted:
            rows_ND = rows_ND * self.weight_N1.to(dtype)
        y_TD = rows_ND.new_zeros(self.num_tokens, rows_ND.shape[1])
        return y_TD.index_add_(0, self.token_N, rows_ND).to(slots_SD.dtype)

    def _bag_sum(self, rows_ND: Tensor, weighted: bool) -> Tensor:
        """The same where rows stood token by token, K for each: one pass over the rows, no copy."""
        positions_TK = self.unsort(torch.arange(len(self.order_N))).view(self.num_tokens, self.rows_per_token)
        weights_TK = self.unsort(self.weight_N1[:, 0]).to(rows_ND.dtype).view_as(positions_TK) if weighted else None
        return F.embedding_bag(positions_TK, rows_ND, per_sample_weights=weights_TK, mode="sum")

    def unsort(self, values_N: Tensor) -> Tensor:
        """Values in sorted order, back in the order of the routed rows."""
        return torch.empty_like(values_N).index_copy_(0, self.order_N, values_N)


def mlp_forward(route: Route, x_TD: Tensor, experts: Experts, keep: bool) -> tuple[Tensor, Tensor]:
    """`(y_TD, pre_NH)`: the output, and the pre-activations in sorted order, empty unless `keep`."""
    pre_SH = route.layout.mm(route.gather(x_TD), experts.w1, experts.b1)
    hidden_SH = activate(experts.activation, pre_SH) if keep else activate_(experts.activation, pre_SH)
    pre_NH = route.layout.take(pre_SH) if keep else pre_SH.new_empty(0)
    del pre_SH
    out_SD = route.layout.mm(hidden_SH, experts.w2, experts.b2)
    del hidden_SH
    return route.scatter_sum(out_SD, weighted=True), pre_NH


def mlp_backward(
    route: Route, grad_TD: Tensor, x_TD: Tensor, pre_NH: Tensor, experts: Experts, needed: Sequence[bool]
) -> list[Tensor | None]:
    """Gradients of x, weights, w1, b1, w2, b2, in this order; None where `needed` is False."""
    layout = route.layout
    need_x, need_weights, need_w1, need_b1, need_w2, need_b2 = needed
    dx = dweights = dw1 = db1 = dw2 = db2 = None

    grad_SD = route.gather(grad_TD)
    pre_SH = layout.put(pre_NH)
    hidden_SH = activate(experts.activation, pre_SH)
    dhidden_SH = layout.mm_transposed(grad_SD, experts.w2)
    dtype = accumulation_dtype(grad_SD.dtype)
    if need_weights and experts.b2 is not None:
        dweight_S1 = (layout.expand(experts.b2) * grad_SD).sum(1, keepdim=True, dtype=dtype)
    else:
        dweight_S1 = grad_SD.new_zeros((), dtype=dtype)
    weight_S1 = layout.put(route.weight_N1).to(grad_SD.dtype)
    grad_SD = grad_SD.mul_(weight_S1)
    if need_w2:
        dw2 = layout.weight_grad(grad_SD, hidden_SH)
    if need_b2:
        db2 = layout.bias_grad(grad_SD)
    if need_weights:
        dweight_S1 = dweight_S1 + hidden_SH.mul_(dhidden_SH).sum(1, keepdim=True, dtype=dtype)
        dweights = route.unsort(layout.take(dweight_S1)[:, 0]).to(route.weight_N1.dtype)
    del hidden_SH, grad_SD
    if need_x or need_w1 or need_b1:
        dpre_SH = activate_backward(experts.activation, dhidden_SH.mul_(weight_S1), pre_SH)
        del dhidden_SH, pre_SH
        if need_w1:
            dw1 = layout.weight_grad(dpre_SH, route.gather(x_TD))
        if need_b1:
            db1 = layout.bias_grad(dpre_SH)
        if need_x:
            dx = route.scatter_sum(layout.mm_transposed(dpre_SH, experts.w1), weighted=False)
    return [dx, dweights, dw1, db1, dw2, db2]
