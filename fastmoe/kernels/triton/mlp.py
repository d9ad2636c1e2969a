"""The whole routed MLP by Triton: which kernels run, in which order, and what lives how long.

Forward keeps the pre-activations of every row, in sorted order, and nothing else of a row's size; backward activates
anew. The gradient of a row's weight needs no second product: `<h @ w2.T + b2, g> = <h, g @ w2> + <b2, g>`.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fastmoe.kernels.activations import get_activation
from fastmoe.kernels.torch_ops.layout import grouped_mm_fits
from fastmoe.kernels.triton.activation import activate, activate_backward
from fastmoe.kernels.triton.combine import combine, combine_backward, lists_of, weights_grad
from fastmoe.kernels.triton.launch import contiguous, on_its_device
from fastmoe.kernels.triton.prepare import Rows, Tiles, prepare, tiles_of
from fastmoe.kernels.triton.product import backward, forward, product
from fastmoe.kernels.triton.tiles import Problem, Tile, choose_tile
from fastmoe.kernels.triton.weight_grad import weight_grad


def _tile(
    kind: str, like: Tensor, num_rows: int, weight_EOI: Tensor, gated: bool = False, bias: bool = False
) -> Tile | None:
    """The tile for one product, None where `F.grouped_mm` is to take it; that knows no bias."""
    num_experts, outputs, inputs = weight_EOI.shape
    problem = Problem(kind, like.dtype, num_rows, num_experts, outputs, inputs, gated)
    return choose_tile(problem, like.device, grouped_mm=not bias and grouped_mm_fits(weight_EOI))


class _Grid:
    """Row tiles of one plan, made once for each height."""

    def __init__(self, offsets_E: Tensor, num_rows: int) -> None:
        self.offsets_E, self.num_rows = offsets_E, num_rows
        self.made: dict[int, Tiles] = {}

    def rows(self, order_N: Tensor, token_ids_N: Tensor, weights_N: Tensor, num_tokens: int, tile: Tile | None) -> Rows:
        """The plan's rows; the tiles of `tile` come with them, in one launch."""
        height = 128 if tile is None else tile.rows
        rows, self.made[height] = prepare(order_N, self.offsets_E, token_ids_N, weights_N, num_tokens, height)
        return rows

    def tiles(self, tile: Tile) -> Tiles:
        if tile.rows not in self.made:
            self.made[tile.rows] = tiles_of(self.offsets_E, self.num_rows, tile.rows)
        return self.made[tile.rows]


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
    grid = _Grid(offsets_E, N)
    first = _tile("forward", x_TD, N, w1, gated, b1 is not None)
    rows = grid.rows(order_N, token_ids_N, weights_N, len(x_TD), first)
    if first is not None and first.split == 1:
        hidden_NH, pre_NW = forward(x_TD, rows.token_N, w1, b1, activation, grid.tiles(first), first, keep)
    else:
        if first is None:
            parts_SNW = F.grouped_mm(_gather(x_TD, rows), w1.transpose(1, 2), offs=offsets_E).unsqueeze(0)
        else:
            parts_SNW = product(x_TD, rows.token_N, w1, b1, grid.tiles(first), first)
        hidden_NH, pre_NW = activate(parts_SNW, offsets_E, activation, x_TD.dtype, keep)
        del parts_SNW
    second = _tile("product", x_TD, N, w2, bias=b2 is not None)
    if second is None:
        out_SND = F.grouped_mm(hidden_NH, w2.transpose(1, 2), offs=offsets_E).unsqueeze(0)
    else:
        out_SND = product(hidden_NH, None, w2, b2, grid.tiles(second), second)
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
    grid = _Grid(offsets_E, N)
    tile = _tile("backward", x_TD, N, w2, get_activation(activation).gated)
    rows = grid.rows(order_N, token_ids_N, weights_N, len(x_TD), tile)
    need_pair = need_w2 or need_b2
    if tile is None:
        dhidden_NH = F.grouped_mm(_gather(grad_TD, rows), w2, offs=offsets_E)
        dpre_NW, hidden_NH, dots_CN = activate_backward(
            dhidden_NH, pre_NW, rows.weight_N, offsets_E, activation, need_pair
        )
        del dhidden_NH
    else:
        dpre_NW, hidden_NH, dots_CN = backward(
            grad_TD, rows.token_N, w2, pre_NW, rows.weight_N, activation, grid.tiles(tile), tile, need_pair
        )
    if need_weights:
        dweights = weights_grad(dots_CN, b2, grad_TD, rows.token_N, order_N, offsets_E, weights_N.dtype)
    if need_pair:
        assert hidden_NH is not None
        tile = _tile("weight", x_TD, N, w2, bias=need_b2)
        if tile is None:
            dw2 = F.grouped_mm(_gather(grad_TD, rows).t(), hidden_NH, offs=offsets_E)
        else:
            dw2, db2 = weight_grad(
                grad_TD, rows.token_N, hidden_NH, None, offsets_E, N, tile, rows.weight_N, need_sums=need_b2
            )
    del hidden_NH
    if need_w1 or need_b1:
        tile = _tile("weight", x_TD, N, w1, bias=need_b1)
        if tile is None:
            dw1 = F.grouped_mm(dpre_NW.t(), _gather(x_TD, rows), offs=offsets_E)
        else:
            dw1, db1 = weight_grad(dpre_NW, None, x_TD, rows.token_N, offsets_E, N, tile, need_sums=need_b1)
    if need_x:
        tile = _tile("turned", x_TD, N, w1)
        if tile is None:
            parts_SND = F.grouped_mm(dpre_NW, w1, offs=offsets_E).unsqueeze(0)
        else:
            parts_SND = product(dpre_NW, None, w1, None, grid.tiles(tile), tile, turned=True)
        del dpre_NW
        lists = lists_of(token_ids_N, len(x_TD), rows_per_token)
        dx = combine(parts_SND, rows.position_N, None, offsets_E, len(x_TD), lists, x_TD.dtype)
    return [dx, dweights, dw1 if need_w1 else None, db1, dw2 if need_w2 else None, db2]


def _gather(values_TD: Tensor, rows: Rows) -> Tensor:
    return values_TD.index_select(0, rows.token_N)


@on_its_device
def grouped_mm(rows_NI: Tensor, weight_EOI: Tensor, bias_EO: Tensor | None, offsets_E: Tensor) -> Tensor:
    """`rows @ weight[e].T + bias[e]`, zero where a row is not computed."""
    rows_NI, weight_EOI, bias_EO, offsets_E = contiguous(rows_NI, weight_EOI, bias_EO, offsets_E)
    tile = _tile("product", rows_NI, len(rows_NI), weight_EOI, bias=bias_EO is not None)
    if tile is None:
        out_NO = F.grouped_mm(rows_NI, weight_EOI.transpose(1, 2), offs=offsets_E)
    else:
        tiles = tiles_of(offsets_E, len(rows_NI), tile.rows)
        out_NO = _summed(product(rows_NI, None, weight_EOI, bias_EO, tiles, tile), rows_NI.dtype)
    return _routed_only(out_NO, offsets_E)


@on_its_device
def grouped_mm_backward(
    grad_NO: Tensor, rows_NI: Tensor, weight_EOI: Tensor, offsets_E: Tensor, needed: Sequence[bool]
) -> list[Tensor | None]:
    """Gradients of rows, weight and bias."""
    grad_NO, rows_NI, weight_EOI, offsets_E = contiguous(grad_NO, rows_NI, weight_EOI, offsets_E)
    N = len(rows_NI)
    drows = dweight = dbias = None
    if needed[0]:
        tile = _tile("turned", rows_NI, N, weight_EOI)
        if tile is None:
            drows = F.grouped_mm(grad_NO, weight_EOI, offs=offsets_E)
        else:
            tiles = tiles_of(offsets_E, N, tile.rows)
            drows = _summed(product(grad_NO, None, weight_EOI, None, tiles, tile, turned=True), rows_NI.dtype)
        drows = _routed_only(drows, offsets_E)
    if needed[1] or needed[2]:
        tile = _tile("weight", rows_NI, N, weight_EOI, bias=needed[2])
        if tile is None:
            dweight = F.grouped_mm(grad_NO.t(), rows_NI, offs=offsets_E)
        else:
            dweight, dbias = weight_grad(grad_NO, None, rows_NI, None, offsets_E, N, tile, need_sums=needed[2])
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
