"""The gradient of stacked weights: for each expert, `a[rows].T @ b[rows]` reduced over its rows, and `a[rows].sum(0)`.

One program for each tile of an expert's matrix; the device hands them out as they finish. Where matrices are small, the
tiles of an expert with many rows would be waited for: then an expert's rows are cut into pieces of a quarter of what a
multiprocessor has to do at most. An expert of one piece is written at once; the float32 sums of several are added, in
order, by a second launch.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastmoe.kernels.triton.launch import num_processors, precision
from fastmoe.kernels.triton.prepare import tiles_of
from fastmoe.kernels.triton.tiles import Tile

_PIECES_FOR_EACH_PROCESSOR = 4  # with as many tiles or pieces of equal length, nobody waits long for the last


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
def slot_of(begin, expert_begin, expert_end, height, num_slots):
    """The place among the pieces of the one that starts at `begin`.

    Only experts of several pieces have places. Their pieces' starts are `height` apart but for the last piece's, which
    lies in the second half of the places, by its expert's start; and these too are more than `height` apart.
    """
    last = begin + height >= expert_end
    return tl.where(last, num_slots // 2 + expert_begin // height, begin // height)


@triton.jit
def weight_grad_kernel(
    a, a_index, b, b_index, row_weights, out, sums_out, pieces, sums_pieces, experts, starts, total, offsets, O, I,
    height, num_slots, CUT: tl.constexpr, EVEN: tl.constexpr, PRECISION: tl.constexpr, GROUP: tl.constexpr,
    BO: tl.constexpr, BI: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    columns = tl.cdiv(I, BI)
    per_piece = tl.cdiv(O, BO) * columns
    expert = tl.program_id(0) // per_piece
    piece = expert
    if CUT:
        if piece >= tl.load(total):
            return
        expert = tl.load(experts + piece)
    expert_begin = tl.load(offsets + expert - 1, mask=expert > 0, other=0)
    expert_end = tl.load(offsets + expert)
    begin, end = expert_begin, expert_end
    if CUT:
        begin = tl.load(starts + piece)
        end = tl.minimum(begin + height, expert_end)
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
    if CUT:
        if expert_end - expert_begin > height:
            slot = slot_of(begin, expert_begin, expert_end, height, num_slots)
            _store(pieces, sums_pieces, slot, acc, sums, o0, i0, O, I)
            return
    _store(out, sums_out, expert, acc, sums, o0, i0, O, I)


@triton.jit
def _store(out, sums_out, number, acc, sums, o0, i0, O, I):
    o, i = o0 + tl.arange(0, acc.shape[0]), i0 + tl.arange(0, acc.shape[1])
    at = out + number.to(tl.int64) * O * I + o.to(tl.int64)[:, None] * I + i[None, :]
    tl.store(at, acc.to(out.dtype.element_ty), mask=(o < O)[:, None] & (i < I)[None, :])
    if sums_out is not None:
        if i0 == 0:
            tl.store(sums_out + number.to(tl.int64) * O + o, sums.to(sums_out.dtype.element_ty), mask=o < O)


@triton.jit
def add_pieces_kernel(pieces, out, offsets, E, size, height, num_slots, BLOCK_E: tl.constexpr, BLOCK: tl.constexpr):
    """`out[e] = pieces of e, added in order`; one program for a block of the expert whose last piece is in a place."""
    expert_begin = 0
    expert_end = 0
    expert = 0
    for e0 in range(0, E, BLOCK_E):
        e = e0 + tl.arange(0, BLOCK_E)
        ends = tl.load(offsets + e, mask=e < E, other=0)
        begins = tl.load(offsets + e - 1, mask=(e < E) & (e > 0), other=0)
        own = (ends - begins > height) & (begins // height == tl.program_id(0)) & (e < E)
        expert += tl.sum(tl.where(own, e, 0), 0)
        expert_begin += tl.sum(tl.where(own, begins, 0), 0)
        expert_end += tl.sum(tl.where(own, ends, 0), 0)
    if expert_end == 0:
        return
    at = tl.program_id(1).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    acc = tl.zeros((BLOCK,), tl.float32)
    for begin in range(expert_begin, expert_end, height):
        slot = slot_of(begin, expert_begin, expert_end, height, num_slots)
        acc += tl.load(pieces + slot.to(tl.int64) * size + at, mask=at < size, other=0)
    out_at = out + tl.cast(expert, tl.int64) * size + at
    tl.store(out_at, acc.to(out.dtype.element_ty), mask=at < size)


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
    height = _height(num_rows, per_expert, tile.depth, num_processors(a.device))
    table: tuple[Tensor | None, ...] = (None, None, None)
    P, slots = E, 0
    if height < num_rows:
        tiles = tiles_of(offsets_E, num_rows, height, at_least_one=True)
        table, P, slots = (tiles.expert_S, tiles.start_S, tiles.total_1), len(tiles.expert_S), num_rows // height + 1
    grad, pieces = a.new_empty((E, O, I)), a.new_empty((2 * slots, O, I), dtype=torch.float32)
    sums = a.new_empty((E, O)) if need_sums else None
    sums_pieces = a.new_empty((2 * slots, O), dtype=torch.float32) if need_sums else None
    even = O % tile.rows == 0 and I % tile.columns == 0
    gathered = a_index is not None or b_index is not None
    stages = tile.stages if gathered else max(2, tile.stages - 2)  # indices take two, operands then the rest
    weight_grad_kernel[(P * per_expert,)](
        a, a_index, b, b_index, row_weights, grad, sums, pieces, sums_pieces, *table, offsets_E, O, I, height,
        2 * slots, slots > 0, even, precision(a.dtype), tile.group, tile.rows, tile.columns, tile.depth,
        num_warps=tile.warps, num_stages=stages,
    )  # fmt: skip
    if slots:
        _add(pieces, grad, offsets_E, height)
    if slots and sums is not None and sums_pieces is not None:
        _add(sums_pieces, sums, offsets_E, height)
    return grad, sums


def _height(num_rows: int, per_expert: int, depth: int, processors: int) -> int:
    """Rows of a piece: a quarter of a multiprocessor's share of all tiles, each as long as its expert's rows."""
    return max(depth, triton.cdiv(num_rows * per_expert, _PIECES_FOR_EACH_PROCESSOR * processors))


def _add(pieces: Tensor, out: Tensor, offsets_E: Tensor, height: int) -> None:
    size, BLOCK = out[0].numel(), 1024
    add_pieces_kernel[(len(pieces) // 2, triton.cdiv(size, BLOCK))](
        pieces, out, offsets_E, len(out), size, height, len(pieces), min(128, triton.next_power_of_2(len(out))), BLOCK
    )
