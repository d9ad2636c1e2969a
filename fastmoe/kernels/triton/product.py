"""Products of sorted rows with their expert's matrix: plain, with the activation behind, with its gradient behind.

Programs are persistent: as many as the GPU holds, each walking tiles `pid, pid + programs, ...` of the table that
`prepare` made. `GROUP` row tiles are walked together, column by column, so that what they share stays in L2.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from fastmoe.kernels.triton.activation import act, base, store_activation_grads
from fastmoe.kernels.triton.launch import num_processors, precision
from fastmoe.kernels.triton.prepare import Tiles
from fastmoe.kernels.triton.tiles import Tile


@triton.jit
def locate(tile, num_row_tiles, columns, experts, starts, offsets, GROUP: tl.constexpr, BM: tl.constexpr):
    """`(expert, first row, rows, which of them are there, column tile)` of a tile's number."""
    per_group = GROUP * columns
    first = tile // per_group * GROUP
    height = tl.minimum(num_row_tiles - first, GROUP)
    slot = first + tile % per_group % height
    expert = tl.load(experts + slot)
    start = tl.load(starts + slot)
    rows = start + tl.arange(0, BM)
    return expert, start, rows, rows < tl.load(offsets + expert), tile % per_group // height


@triton.jit
def weight_tile(w, expert, n0, k, O, I, COLUMNS, DEPTH, TURNED: tl.constexpr, TMA: tl.constexpr,
                EVEN_N: tl.constexpr, EVEN_K: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):  # fmt: skip
    """A `(BK, BN)` tile of `w[e].T`; if turned, of `w[e]`. `w` is `(E, O, I)`."""
    if TMA:
        if TURNED:
            b = tl.reshape(w.load([expert, k, n0]), (BK, BN))
        else:
            b = tl.reshape(w.load([expert, n0, k]), (BN, BK)).T
    else:
        n, ks = n0 + tl.arange(0, BN), k + tl.arange(0, BK)
        matrix = w + expert.to(tl.int64) * O * I
        at = matrix + ks[:, None] * I + n[None, :] if TURNED else matrix + n[None, :] * I + ks[:, None]
        if EVEN_N and EVEN_K:
            b = tl.load(at)
        else:
            b = tl.load(at, mask=(n < COLUMNS)[None, :] & (ks < DEPTH)[:, None], other=0)
    return b


@triton.jit
def multiply(
    a, index, w, expert, start, rows, valid, n0, n1, k0, k1, O, I, COLUMNS, DEPTH,
    TWO: tl.constexpr, TURNED: tl.constexpr, A_TMA: tl.constexpr, W_TMA: tl.constexpr, EVEN_N: tl.constexpr,
    EVEN_K: tl.constexpr, PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """`rows @ w` over columns from n0 and, if `TWO`, over those from n1 too, reduced over k0 to k1, in float32."""
    acc = tl.zeros((BM, BN), tl.float32)
    acc2 = tl.zeros((BM, BN), tl.float32)
    if not A_TMA:
        source = tl.load(index + rows, mask=valid, other=0) if index is not None else rows
        a_rows = a + source.to(tl.int64)[:, None] * DEPTH
    for k in range(k0, k1, BK):
        if A_TMA:
            a_tile = a.load([start, k])
        else:
            ks = k + tl.arange(0, BK)
            a_mask = valid[:, None] if EVEN_K else valid[:, None] & (ks < k1)[None, :]
            a_tile = tl.load(a_rows + ks[None, :], mask=a_mask, other=0)
        b = weight_tile(w, expert, n0, k, O, I, COLUMNS, DEPTH, TURNED, W_TMA, EVEN_N, EVEN_K, BN, BK)
        acc = tl.dot(a_tile, b, acc, input_precision=PRECISION)
        if TWO:
            b2 = weight_tile(w, expert, n1, k, O, I, COLUMNS + n1 - n0, DEPTH, TURNED, W_TMA, EVEN_N, EVEN_K, BN, BK)
            acc2 = tl.dot(a_tile, b2, acc2, input_precision=PRECISION)
    return acc, acc2


@triton.jit
def halves(acc):
    """The left and the right half of a tile's columns: what stands behind a product then takes half the registers."""
    return tl.split(tl.permute(tl.reshape(acc, (acc.shape[0], 2, acc.shape[1] // 2)), (0, 2, 1)))


@triton.jit
def product_kernel(
    a, index, w, bias, out, experts, starts, total, offsets, N, O, I, COLUMNS, DEPTH, part,
    SPLIT: tl.constexpr, TURNED: tl.constexpr, A_TMA: tl.constexpr, W_TMA: tl.constexpr, EVEN_N: tl.constexpr,
    EVEN_K: tl.constexpr, PRECISION: tl.constexpr, GROUP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    BK: tl.constexpr,
):  # fmt: skip
    num_row_tiles = tl.load(total)
    columns = tl.cdiv(COLUMNS, BN)
    for number in range(tl.program_id(0), num_row_tiles * columns * SPLIT, tl.num_programs(0)):
        s = number % SPLIT
        expert, start, rows, valid, column = locate(
            number // SPLIT, num_row_tiles, columns, experts, starts, offsets, GROUP, BM
        )
        k0 = s * part
        acc, _ = multiply(
            a, index, w, expert, start, rows, valid, column * BN, 0, k0, tl.minimum(k0 + part, DEPTH), O, I,
            COLUMNS, DEPTH, False, TURNED, A_TMA, W_TMA, EVEN_N, EVEN_K, PRECISION, BM, BN, BK,
        )  # fmt: skip
        n = column * BN + tl.arange(0, BN)
        if bias is not None:
            b = tl.load(bias + expert.to(tl.int64) * COLUMNS + n, mask=n < COLUMNS, other=0).to(tl.float32)
            acc += tl.where(s == 0, b, 0.0)[None, :]
        at = out + (s.to(tl.int64) * N + rows.to(tl.int64))[:, None] * COLUMNS + n[None, :]
        tl.store(at, acc.to(out.dtype.element_ty), mask=valid[:, None] & (n < COLUMNS)[None, :])


@triton.jit
def forward_kernel(
    a, index, w, bias, pre, hidden, experts, starts, total, offsets, D, H, KIND: tl.constexpr, GATED: tl.constexpr,
    A_TMA: tl.constexpr, W_TMA: tl.constexpr, EVEN_N: tl.constexpr, EVEN_K: tl.constexpr, PRECISION: tl.constexpr,
    GROUP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    num_row_tiles = tl.load(total)
    columns = tl.cdiv(H, BN)
    W = H * (1 + GATED)
    for number in range(tl.program_id(0), num_row_tiles * columns, tl.num_programs(0)):
        expert, start, rows, valid, column = locate(number, num_row_tiles, columns, experts, starts, offsets, GROUP, BM)
        n0 = column * BN
        z, up = multiply(
            a, index, w, expert, start, rows, valid, n0, n0 + H, 0, D, W, D, H, D,
            GATED, False, A_TMA, W_TMA, EVEN_N, EVEN_K, PRECISION, BM, BN, BK,
        )  # fmt: skip
        z0, z1 = halves(z)
        up0, up1 = halves(up)
        store_activated(z0, up0, bias, pre, hidden, expert, rows, valid, n0, H, KIND, GATED)
        store_activated(z1, up1, bias, pre, hidden, expert, rows, valid, n0 + BN // 2, H, KIND, GATED)


@triton.jit
def store_activated(z, up, bias, pre, hidden, expert, rows, valid, n0, H, KIND: tl.constexpr, GATED: tl.constexpr):
    """Bias, activation and, if `pre` is not None, what was activated."""
    n = n0 + tl.arange(0, z.shape[1])
    W = H * (1 + GATED)
    if bias is not None:
        own = bias + expert.to(tl.int64) * W + n
        z += tl.load(own, mask=n < H, other=0).to(tl.float32)[None, :]
        if GATED:
            up += tl.load(own + H, mask=n < H, other=0).to(tl.float32)[None, :]
    mask = valid[:, None] & (n < H)[None, :]
    wide = rows.to(tl.int64)[:, None]
    if pre is not None:
        tl.store(pre + wide * W + n[None, :], z.to(pre.dtype.element_ty), mask=mask)
        if GATED:
            tl.store(pre + wide * W + H + n[None, :], up.to(pre.dtype.element_ty), mask=mask)
    value = act(z, KIND) * up if GATED else act(z, KIND)
    tl.store(hidden + wide * H + n[None, :], value.to(hidden.dtype.element_ty), mask=mask)


@triton.jit
def backward_kernel(
    grad, index, w, pre, weights, hidden, dpre, dots, experts, starts, total, offsets, N, D, H,
    KIND: tl.constexpr, GATED: tl.constexpr, A_TMA: tl.constexpr, W_TMA: tl.constexpr, EVEN_N: tl.constexpr,
    EVEN_K: tl.constexpr, PRECISION: tl.constexpr, GROUP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    BK: tl.constexpr,
):  # fmt: skip
    num_row_tiles = tl.load(total)
    columns = tl.cdiv(H, BN)
    for number in range(tl.program_id(0), num_row_tiles * columns, tl.num_programs(0)):
        expert, start, rows, valid, column = locate(number, num_row_tiles, columns, experts, starts, offsets, GROUP, BM)
        dh, _ = multiply(
            grad, index, w, expert, start, rows, valid, column * BN, 0, 0, D, D, H, H, D,
            False, True, A_TMA, W_TMA, EVEN_N, EVEN_K, PRECISION, BM, BN, BK,
        )  # fmt: skip
        weight = tl.load(weights + rows, mask=valid, other=0)
        dh0, dh1 = halves(dh)
        args = (weight, pre, hidden, dpre, dots, rows, valid, N, H)
        store_activation_grads(dh0, 2 * column, *args, KIND, GATED)
        store_activation_grads(dh1, 2 * column + 1, *args, KIND, GATED)


def product(
    a: Tensor, index: Tensor | None, w_EOI: Tensor, bias: Tensor | None, tiles: Tiles, tile: Tile, turned: bool = False
) -> Tensor:
    """`(S, N, O)`, in S = `tile.split` float32 parts to be summed, or one in the dtype of `a`; turned `(S, N, I)`.

    Rows of a stand in sorted order, or `index` has the row of each sorted position.
    """
    N = len(a) if index is None else len(index)
    _, O, I = w_EOI.shape
    columns, depth = (I, O) if turned else (O, I)
    part = triton.cdiv(triton.cdiv(depth, tile.split), tile.depth) * tile.depth
    out = a.new_empty((tile.split, N, columns), dtype=a.dtype if tile.split == 1 else torch.float32)
    count = len(tiles.expert_S) * triton.cdiv(columns, tile.columns) * tile.split
    product_kernel[_programs(count, tile, a)](
        *_operands(a, index, w_EOI, tile, turned), bias, out, *_table(tiles), N, O, I, columns, depth, part,
        tile.split, turned, *_constants(a, index, w_EOI, columns, depth, tile), **_options(tile),
    )  # fmt: skip
    return out


def forward(
    x_TD: Tensor, token_N: Tensor, w1: Tensor, b1: Tensor | None, activation: str, tiles: Tiles, tile: Tile, keep: bool
) -> tuple[Tensor, Tensor]:
    """`(hidden_NH, pre_NW)`; pre is empty unless `keep`."""
    kind, gated = base(activation)
    N, (_, W, D) = len(token_N), w1.shape
    H = W // (1 + gated)
    hidden_NH, pre_NW = x_TD.new_empty(N, H), x_TD.new_empty((N, W) if keep else (0,))
    count = len(tiles.expert_S) * triton.cdiv(H, tile.columns)
    forward_kernel[_programs(count, tile, x_TD)](
        *_operands(x_TD, token_N, w1, tile, False), b1, pre_NW if keep else None, hidden_NH, *_table(tiles), D, H,
        kind, gated, *_constants(x_TD, token_N, w1, H, D, tile), **_options(tile),
    )  # fmt: skip
    return hidden_NH, pre_NW


def backward(
    grad_TD: Tensor, token_N: Tensor, w2: Tensor, pre_NW: Tensor, weight_N: Tensor, activation: str,
    tiles: Tiles, tile: Tile, need_hidden: bool,
) -> tuple[Tensor, Tensor | None, Tensor]:  # fmt: skip
    """`(dpre_NW, weighted hidden_NH, dots_CN)`; dots are parts of the weights' gradients, to be summed."""
    kind, gated = base(activation)
    N, (_, D, H) = len(token_N), w2.shape
    columns = triton.cdiv(H, tile.columns)
    dpre_NW, hidden_NH = torch.empty_like(pre_NW), grad_TD.new_empty(N, H) if need_hidden else None
    dots_CN = weight_N.new_empty(2 * columns, N)
    backward_kernel[_programs(len(tiles.expert_S) * columns, tile, grad_TD)](
        *_operands(grad_TD, token_N, w2, tile, True), pre_NW, weight_N, hidden_NH, dpre_NW, dots_CN, *_table(tiles),
        N, D, H, kind, gated, *_constants(grad_TD, token_N, w2, H, D, tile), **_options(tile),
    )  # fmt: skip
    return dpre_NW, hidden_NH, dots_CN


def _table(tiles: Tiles) -> tuple[Tensor, ...]:
    return tiles.expert_S, tiles.start_S, tiles.total_1, tiles.offsets_E


def _programs(count: int, tile: Tile, like: Tensor) -> tuple[int]:
    return (max(1, min(count, num_processors(like.device) * tile.programs)),)


def _options(tile: Tile) -> dict[str, int]:
    return {"num_warps": tile.warps, "num_stages": tile.stages}


def _constants(a: Tensor, index: Tensor | None, w: Tensor, columns: int, depth: int, tile: Tile) -> tuple:
    even = (columns % tile.columns == 0, depth % (tile.depth * tile.split) == 0)
    size = (tile.group, tile.rows, tile.columns, tile.depth)
    return _fits_tma(a, index, tile), _fits_tma(w, None, tile), *even, precision(a.dtype), *size


def _operands(a: Tensor, index: Tensor | None, w: Tensor, tile: Tile, turned: bool) -> tuple:
    block = [tile.depth, tile.columns] if turned else [tile.columns, tile.depth]
    a_arg = _descriptor(a, [tile.rows, tile.depth]) if _fits_tma(a, index, tile) else a
    return a_arg, index, _descriptor(w, [1, *block]) if _fits_tma(w, None, tile) else w


def _fits_tma(tensor: Tensor, index: Tensor | None, tile: Tile) -> bool:
    """Tensor descriptors want rows of a multiple of 16 bytes, and no gather."""
    aligned = tensor.shape[-1] * tensor.element_size() % 16 == 0 and tensor.data_ptr() % 16 == 0
    return tile.tma and index is None and aligned and tensor.numel() > 0


def _descriptor(tensor: Tensor, block: list[int]) -> TensorDescriptor:
    """Of a contiguous tensor; a dimension of size 1 may have any stride, which a descriptor does not take."""
    strides = [math.prod(tensor.shape[i + 1 :]) for i in range(tensor.dim())]
    return TensorDescriptor(tensor, list(tensor.shape), strides, block)
