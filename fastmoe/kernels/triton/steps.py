"""The products of a routed MLP, each by a tile of ours or, where that is None, by `F.grouped_mm`.

That leaves gather and activation to others, which then stand here with it. `fastmoe tune` times these very steps.
"""

import torch.nn.functional as F
from torch import Tensor

from fastmoe.kernels.triton.activation import activate, activate_backward
from fastmoe.kernels.triton.prepare import Rows, Tiles, prepare, tiles_of
from fastmoe.kernels.triton.product import backward, forward, product
from fastmoe.kernels.triton.tiles import Tile
from fastmoe.kernels.triton.weight_grad import weight_grad


class Grid:
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


def activated_product(
    x_TD: Tensor,
    token_N: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    activation: str,
    grid: Grid,
    tile: Tile | None,
    keep: bool,
) -> tuple[Tensor, Tensor]:
    """`(hidden_NH, pre_NW)`: gathered rows @ w1.T + b1, activated; pre is empty unless `keep`."""
    if tile is not None and tile.split == 1:
        return forward(x_TD, token_N, w1, b1, activation, grid.tiles(tile), tile, keep)
    if tile is None:
        parts_SNW = F.grouped_mm(_gathered(x_TD, token_N), w1.transpose(1, 2), offs=grid.offsets_E).unsqueeze(0)
    else:
        parts_SNW = product(x_TD, token_N, w1, b1, grid.tiles(tile), tile)
    return activate(parts_SNW, grid.offsets_E, activation, x_TD.dtype, keep)


def plain_product(
    rows: Tensor, w_EOI: Tensor, bias_EO: Tensor | None, grid: Grid, tile: Tile | None, turned: bool = False
) -> Tensor:
    """Sorted rows @ w.T + bias, turned rows @ w, in S parts to be summed: `(S, N, O)`, turned `(S, N, I)`."""
    if tile is not None:
        return product(rows, None, w_EOI, bias_EO, grid.tiles(tile), tile, turned)
    return F.grouped_mm(rows, w_EOI if turned else w_EOI.transpose(1, 2), offs=grid.offsets_E).unsqueeze(0)


def activation_product(
    grad_TD: Tensor, rows: Rows, w2: Tensor, pre_NW: Tensor, activation: str, grid: Grid, tile: Tile | None,
    need_hidden: bool,
) -> tuple[Tensor, Tensor | None, Tensor]:  # fmt: skip
    """`(dpre_NW, weighted hidden_NH, dots_CN)` from gathered gradients @ w2; the dots are to be summed."""
    if tile is not None:
        tiles = grid.tiles(tile)
        return backward(grad_TD, rows.token_N, w2, pre_NW, rows.weight_N, activation, tiles, tile, need_hidden)
    dhidden_NH = F.grouped_mm(_gathered(grad_TD, rows.token_N), w2, offs=grid.offsets_E)
    return activate_backward(dhidden_NH, pre_NW, rows.weight_N, grid.offsets_E, activation, need_hidden)


def weight_product(
    a: Tensor, a_index: Tensor | None, b: Tensor, b_index: Tensor | None, grid: Grid, tile: Tile | None,
    row_weights: Tensor | None = None, need_sums: bool = False,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """See `weight_grad`; without a tile there are no sums."""
    if tile is not None:
        return weight_grad(a, a_index, b, b_index, grid.offsets_E, grid.num_rows, tile, row_weights, need_sums)
    return F.grouped_mm(_gathered(a, a_index).t(), _gathered(b, b_index), offs=grid.offsets_E), None


def _gathered(values: Tensor, index_N: Tensor | None) -> Tensor:
    return values if index_N is None else values.index_select(0, index_N)
