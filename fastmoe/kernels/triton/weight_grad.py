"""The gradient of stacked weights: for each expert, `a[rows].T @ b[rows]` reduced over its rows, and `a[rows].sum(0)`.

One program for each tile of an expert's matrix; the device hands them out as they finish. Where matrices are small, the
few tiles of an expert with most rows would be waited for: then an expert's rows are cut into pieces of at most 1/16 of
all rows, whose float32 sums are added, in order, by a second launch.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastmoe.kernels.triton.launch import num_processors, precision
from fastmoe.kernels.triton.prepare import tiles_of
from fastmoe.kernels.triton.tiles import Tile

_PIECES = 16
_TILES_FOR_EACH_PROCESSOR = 4  # with as many tiles for each expert, nobody waits long for the last


@triton.jit
def outer(
    a, a_index, b, b_index, row_weights, o0, i0, begin, end, O, I, SUM: tl.constexpr, EVEN: tl.constexpr,
    PRECISION: tl.constexpr, BO: tl.constexpr, BI: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    acc = tl.zeros((BO, BI), tl.float32)
    sums = tl.zeros((BO,), tl.float32)
    o, i = o0 + tl.arange(0, BO), i0 + tl.arange(0, BI)
    for first in range(begin, end, BR):
        r = first + tl.arange(0, BR)
        valid = r < end
        a_rows = tl.load(a_index + r, mask=valid, other=0) if a_index is not None else r
        b_rows = tl.load(b_index + r, mask=valid, other=0) if b_index is not None else r
        a_mask = valid[:, None] if EVEN else valid[:, None] & (o < O)[None, :]
        b_mask = valid[:, None] if EVEN else valid[:, None] & (i < I)[None, :]
        a_tile = tl.load(a + a_rows.to(tl.int64)[:, None] * O + o[None, :], mask=a_mask, other=0)
        b_tile = tl.load(b + b_rows.to(tl.int64)[:, None] * I + i[None, :], mask=b_mask, other=0)
        acc = tl.dot(a_tile.T, b_tile, acc, input_precision=PRECISION)
        if SUM:
            values = a_tile.to(tl.float32)
            if row_weights is not None:
                values *= tl.load(row_weights + r, mask=valid, other=0)[:, None]
            sums += tl.sum(values, 0)
    return acc, sums


@triton.jit
def weight_grad_kernel(
    a, a_index, b, b_index, row_weights, out, sums_out, experts, starts, total, offsets, O, I, height,
    CUT: tl.constexpr, EVEN: tl.constexpr, PRECISION: tl.constexpr, GROUP: tl.constexpr, BO: tl.constexpr,
    BI: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    columns = tl.cdiv(I, BI)
    per_piece = tl.cdiv(O, BO) * columns
    piece = tl.program_id(0) // per_piece
    if CUT:
        if piece >= tl.load(total):
            return
        expert, begin = tl.load(experts + piece), tl.load(starts + piece)
        end = tl.minimum(begin + height, tl.load(offsets + expert))
    else:
        begin = tl.load(offsets + piece - 1, mask=piece > 0, other=0)
        end = tl.load(offsets + piece)
    local = tl.program_id(0) % per_piece
    first = local // (GROUP * columns) * GROUP
    tall = tl.minimum(tl.cdiv(O, BO) - first, GROUP)
    o0 = (first + local % (GROUP * columns) % tall) * BO
    i0 = local % (GROUP * columns) // tall * BI
    sums = tl.zeros((BO,), tl.float32)
    if sums_out is not None:
        if i0 == 0:
            acc, sums = outer(a, a_index, b, b_index, row_weights, o0, i0, begin, end, O, I, True, EVEN, PRECISION,
                              BO, BI, BR)  # fmt: skip
        else:
            acc, sums = outer(a, a_index, b, b_index, row_weights, o0, i0, begin, end, O, I, False, EVEN, PRECISION,
                              BO, BI, BR)  # fmt: skip
    else:
        acc, sums = outer(a, a_index, b, b_index, row_weights, o0, i0, begin, end, O, I, False, EVEN, PRECISION,
                          BO, BI, BR)  # fmt: skip
    o, i = o0 + tl.arange(0, BO), i0 + tl.arange(0, BI)
    at = out + piece.to(tl.int64) * O * I + o.to(tl.int64)[:, None] * I + i[None, :]
    tl.store(at, acc.to(out.dtype.element_ty), mask=(o < O)[:, None] & (i < I)[None, :])
    if sums_out is not None:
        if i0 == 0:
            tl.store(sums_out + piece.to(tl.int64) * O + o, sums.to(sums_out.dtype.element_ty), mask=o < O)


@triton.jit
def add_pieces_kernel(pieces, out, experts, total, size, num_pieces, BLOCK_P: tl.constexpr, BLOCK: tl.constexpr):
    """`out[e] = pieces of e, added in order`."""
    expert = tl.program_id(0)
    at = tl.program_id(1).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    p = tl.arange(0, BLOCK_P)
    owner = tl.load(experts + p, mask=p < tl.minimum(num_pieces, tl.load(total)), other=-1)
    first = tl.min(tl.where(owner == expert, p, BLOCK_P), 0)
    last = tl.max(tl.where(owner == expert, p, -1), 0)
    acc = tl.zeros((BLOCK,), tl.float32)
    for piece in range(first, last + 1):
        acc += tl.load(pieces + tl.cast(piece, tl.int64) * size + at, mask=at < size, other=0)
    tl.store(out + expert.to(tl.int64) * size + at, acc.to(out.dtype.element_ty), mask=at < size)


def weight_grad(
    a: Tensor,
    a_index: Tensor | None,
    b: Tensor,
    b_index: Tensor | None,
    offsets_E: Tensor,
    num_rows: int,
    tile: Tile,
    row_weights: Tensor | None = None,
    need_sums: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """`(grad (E, O, I), sums (E, O) or None)`; rows of a `(.., O)` and b `(.., I)` are sorted, or gathered by index.

    The sums are of `row_weights * a` where those are given.
    """
    E, O, I = len(offsets_E), a.shape[1], b.shape[1]
    per_expert = triton.cdiv(O, tile.rows) * triton.cdiv(I, tile.columns)
    cut = E > 0 and num_rows > 0 and per_expert < _TILES_FOR_EACH_PROCESSOR * num_processors(a.device)
    height = max(triton.cdiv(num_rows, _PIECES), tile.depth) if cut else 0
    pieces = tiles_of(offsets_E, num_rows, height, at_least_one=True) if cut else None
    table = (None, None, None) if pieces is None else (pieces.expert_S, pieces.start_S, pieces.total_1)
    P = E if pieces is None else len(pieces.expert_S)
    dtype = a.dtype if pieces is None else torch.float32
    grad = a.new_empty((P, O, I), dtype=dtype)
    sums = a.new_empty((P, O), dtype=dtype) if need_sums else None
    even = O % tile.rows == 0 and I % tile.columns == 0
    weight_grad_kernel[(P * per_expert,)](
        a, a_index, b, b_index, row_weights, grad, sums, *table, offsets_E, O, I, height, pieces is not None, even,
        precision(a.dtype), tile.group, tile.rows, tile.columns, tile.depth,
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    if pieces is None:
        return grad, sums
    grad = _add(grad, a.new_empty(E, O, I), *table)
    return grad, None if sums is None else _add(sums, a.new_empty(E, O), *table)


def _add(pieces: Tensor, out: Tensor, experts: Tensor, _starts: Tensor, total: Tensor) -> Tensor:
    size = out[0].numel()
    BLOCK = 1024
    add_pieces_kernel[(len(out), triton.cdiv(size, BLOCK))](
        pieces, out, experts, total, size, len(pieces), triton.next_power_of_2(len(pieces)), BLOCK
    )
    return out
