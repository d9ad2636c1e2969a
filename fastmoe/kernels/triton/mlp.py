"""The whole routed MLP by Triton: which kernels run, in which order, and what lives how long.

Forward keeps the pre-activations of every row, in sorted order, and nothing else of a row's size; backward activates
anew. The gradient of a row's weight needs no second product: `<h @ w2.T + b2, g> = <h, g @ w2> + <b2, g>`.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from fastmoe.kernels.activations import get_activation
from fastmoe.kernels.torch_ops.layout import grouped_mm_fits
from fastmoe.kernels.triton.combine import combine, combine_backward, lists_of, weights_grad
from fastmoe.kernels.triton.launch import contiguous, on_its_device
from fastmoe.kernels.triton.prepare import prepare
from fastmoe.kernels.triton.steps import Grid, activated_product, activation_product, plain_product, weight_product
from fastmoe.kernels.triton.tiles import Problem, Tile, choose_tile


def _tile(
    kind: str, like: Tensor, num_rows: int, weight_EOI: Tensor, gated: bool = False, bias: bool = False
) -> Tile | None:
    """The tile for one product, None where `F.grouped_mm` is to take it; that knows no bias."""
    num_experts, outputs, inputs = weight_EOI.shape
    problem = Problem(kind, like.dtype, num_rows, num_experts, outputs, inputs, gated)
    return choose_tile(problem, like.device, grouped_mm=not bias and grouped_mm_fits(weight_EOI))


@on_its_device
def mlp_forward(
    x_TD: Tensor,
    weights_N: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    token_ids_N: Tensor,
    order_N: Tensor,
    offsets_E: Tensor,
    activation: str,
    rows_per_token: int,
    keep: bool,
) -> tuple[Tensor, Tensor]:
    """`(y_TD, pre_NW)`: the output, and the pre-activations in sorted order, empty unless `keep`."""
    x_TD, w1, b1, w2, b2 = contiguous(x_TD, w1, b1, w2, b2)
    order_N, offsets_E = contiguous(order_N, offsets_E)
    N, gated = len(order_N), get_activation(activation).gated
    if N == 0:
        return torch.zeros_like(x_TD), x_TD.new_empty((0, w1.shape[1]) if keep else (0,))
    grid = Grid(offsets_E, N)
    tile = _tile("forward", x_TD, N, w1, gated, b1 is not None)
    rows = grid.rows(order_N, token_ids_N, weights_N, len(x_TD), tile)
    hidden_NH, pre_NW = activated_product(x_TD, rows.token_N, w1, b1, activation, grid, tile, keep)
    tile = _tile("product", x_TD, N, w2, bias=b2 is not None)
    out_SND = plain_product(hidden_NH, w2, b2, grid, tile)
    del hidden_NH
    lists = lists_of(token_ids_N, len(x_TD), rows_per_token)
    return combine(out_SND, rows.position_N, rows.weight_N, offsets_E, len(x_TD), lists, x_TD.dtype), pre_NW


@on_its_device
def mlp_backward(
    grad_TD: Tensor,
    x_TD: Tensor,
    weights_N: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    token_ids_N: Tensor,
    order_N: Tensor,
    offsets_E: Tensor,
    pre_NW: Tensor,
    activation: str,
    rows_per_token: int,
    needed: Sequence[bool],
) -> list[Tensor | None]:
    """Gradients of x, weights, w1, b1, w2, b2, in this order; None where `needed` is False."""
    grad_TD, x_TD, w1, w2, b2 = contiguous(grad_TD, x_TD, w1, w2, b2)
    order_N, offsets_E = contiguous(order_N, offsets_E)
    need_x, need_weights, need_w1, need_b1, need_w2, need_b2 = needed
    N = len(order_N)
    if N == 0:
        given = zip((x_TD, weights_N, w1, b1, w2, b2), needed, strict=True)
        return [
            None if t is None or not need else torch.zeros_like(t, memory_format=torch.contiguous_format)
            for t, need in given
        ]
    dx = dweights = dw1 = db1 = dw2 = db2 = None
    grid = Grid(offsets_E, N)
    tile = _tile("backward", x_TD, N, w2, get_activation(activation).gated)
    rows = grid.rows(order_N, token_ids_N, weights_N, len(x_TD), tile)
    need_pair = need_w2 or need_b2
    dpre_NW, hidden_NH, dots_CN = activation_product(grad_TD, rows, w2, pre_NW, activation, grid, tile, need_pair)
    if need_weights:
        dweights = weights_grad(dots_CN, b2, grad_TD, rows.token_N, order_N, offsets_E, weights_N.dtype)
    if need_pair:
        assert hidden_NH is not None
        tile = _tile("weight", x_TD, N, w2, bias=need_b2)
        dw2, db2 = weight_product(grad_TD, rows.token_N, hidden_NH, None, grid, tile, rows.weight_N, need_b2)
    del hidden_NH
    if need_w1 or need_b1:
        tile = _tile("weight", x_TD, N, w1, bias=need_b1)
        dw1, db1 = weight_product(dpre_NW, None, x_TD, rows.token_N, grid, tile, need_sums=need_b1)
    if need_x:
        parts_SND = plain_product(dpre_NW, w1, None, grid, _tile("turned", x_TD, N, w1), turned=True)
        del dpre_NW
        lists = lists_of(token_ids_N, len(x_TD), rows_per_token)
        dx = combine(parts_SND, rows.position_N, None, offsets_E, len(x_TD), lists, x_TD.dtype)
    return [dx, dweights, dw1 if need_w1 else None, db1, dw2 if need_w2 else None, db2]


@on_its_device
def grouped_mm(rows_NI: Tensor, weight_EOI: Tensor, bias_EO: Tensor | None, offsets_E: Tensor) -> Tensor:
    """`rows @ weight[e].T + bias[e]`, zero where a row is not computed."""
    rows_NI, weight_EOI, bias_EO, offsets_E = contiguous(rows_NI, weight_EOI, bias_EO, offsets_E)
    N = len(rows_NI)
    tile = _tile("product", rows_NI, N, weight_EOI, bias=bias_EO is not None)
    out_NO = _summed(plain_product(rows_NI, weight_EOI, bias_EO, Grid(offsets_E, N), tile), rows_NI.dtype)
    return _routed_only(out_NO, offsets_E)


@on_its_device
def grouped_mm_backward(
    grad_NO: Tensor, rows_NI: Tensor, weight_EOI: Tensor, offsets_E: Tensor, needed: Sequence[bool]
) -> list[Tensor | None]:
    """Gradients of rows, weight and bias."""
    grad_NO, rows_NI, weight_EOI, offsets_E = contiguous(grad_NO, rows_NI, weight_EOI, offsets_E)
    N = len(rows_NI)
    grid = Grid(offsets_E, N)
    drows = dweight = dbias = None
    if needed[0]:
        tile = _tile("turned", rows_NI, N, weight_EOI)
        drows = _summed(plain_product(grad_NO, weight_EOI, None, grid, tile, turned=True), rows_NI.dtype)
        drows = _routed_only(drows, offsets_E)
    if needed[1] or needed[2]:
        tile = _tile("weight", rows_NI, N, weight_EOI, bias=needed[2])
        dweight, dbias = weight_product(grad_NO, None, rows_NI, None, grid, tile, need_sums=needed[2])
    return [drows, dweight if needed[1] else None, dbias]


def _summed(parts_SNO: Tensor, dtype: torch.dtype) -> Tensor:
    return parts_SNO[0] if len(parts_SNO) == 1 else parts_SNO.sum(0).to(dtype)


def _routed_only(rows_NO: Tensor, offsets_E: Tensor) -> Tensor:
    """Zeros in rows past the last expert's."""
    positions_N = torch.arange(len(rows_NO), device=rows_NO.device)
    return rows_NO.masked_fill_((positions_N >= offsets_E[-1]).unsqueeze(1), 0)


@on_its_device
def combine_rows(
    rows_NO: Tensor, token_ids_N: Tensor, weights_N: Tensor, order_N: Tensor, offsets_E: Tensor, num_tokens: int
) -> Tensor:
    """Each token's weighted sum of its rows, `(T, O)`."""
    if len(rows_NO) == 0:
        return rows_NO.new_zeros(num_tokens, rows_NO.shape[1])
    order_N, offsets_E = contiguous(order_N, offsets_E)
    rows, _ = prepare(order_N, offsets_E, token_ids_N, weights_N, num_tokens, 128)
    lists = lists_of(token_ids_N, num_tokens, 0)
    parts_1NO = rows_NO.contiguous().unsqueeze(0)
    return combine(parts_1NO, rows.position_N, rows.weight_N, offsets_E, num_tokens, lists, rows_NO.dtype)


@on_its_device
def combine_rows_backward(
    grad_TO: Tensor,
    rows_NO: Tensor,
    token_ids_N: Tensor,
    weights_N: Tensor,
    order_N: Tensor,
    offsets_E: Tensor,
    needed: list[bool],
) -> list[Tensor | None]:
    """Gradients of rows and weights."""
    order_N, offsets_E = contiguous(order_N, offsets_E)
    rows, _ = prepare(order_N, offsets_E, token_ids_N, weights_N, len(grad_TO), 128)
    grad_TO, rows_NO = contiguous(grad_TO, rows_NO)
    return combine_backward(grad_TO, rows_NO, rows.token_N, rows.weight_N, order_N, offsets_E, weights_N.dtype, needed)
