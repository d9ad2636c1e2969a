"""The plan: a stable counting sort of rows by expert, in two launches; in one where rows are few.

Rows are cut into C chunks, one program each. The first launch counts each chunk's rows by expert; in the second, each
program sums those counts into its own first place for every expert, and walks its chunk in order. Dropped rows, id -1,
are one more bin, the last. Ids out of range stop the device, as PyTorch's own indexing does; the interpreter knows no
such thing, so on a CPU they are looked at before.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastmoe.kernels.contract import ids_out_of_range
from fastmoe.kernels.triton.launch import num_processors, on_its_device

_ONE_LAUNCH = 2048  # rows that one program sorts by itself
_CHUNK = 512  # rows that are worth a program
_WALK = 128  # rows that are ranked against each other at once


@triton.jit
def _bin(ids, row, valid, E):
    expert = tl.load(ids + row, mask=valid, other=-1)
    tl.device_assert((expert >= -1) & (expert < E), "an expert id is out of range")
    return tl.where(expert < 0, E, expert).to(tl.int32)


@triton.jit
def _count(ids, start, end, E, BINS: tl.constexpr, BLOCK: tl.constexpr):
    counts = tl.zeros((BINS,), tl.int32)
    for first in range(start, end, BLOCK):
        row = first + tl.arange(0, BLOCK)
        counts += tl.histogram(_bin(ids, row, row < end, E), BINS, mask=row < end)
    return counts


@triton.jit
def count_kernel(ids, counts, N, E, chunk, BINS: tl.constexpr, BLOCK: tl.constexpr):
    start = tl.program_id(0).to(tl.int64) * chunk
    found = _count(ids, start, tl.minimum(start + chunk, N), E, BINS, BLOCK)
    tl.store(counts + tl.program_id(0) * BINS + tl.arange(0, BINS), found)


@triton.jit
def place_kernel(
    ids, counts, places, order, offsets, N, E, chunk, num_chunks,
    ALONE: tl.constexpr, BINS: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK: tl.constexpr, WALK: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    start = pid.to(tl.int64) * chunk
    end = tl.minimum(start + chunk, N)
    bins = tl.arange(0, BINS)
    if ALONE:
        total = _count(ids, start, end, E, BINS, BLOCK)
        before = tl.zeros((BINS,), tl.int32)
    else:
        total = tl.zeros((BINS,), tl.int32)
        before = tl.zeros((BINS,), tl.int32)
        for first in range(0, num_chunks, BLOCK_C):
            c = first + tl.arange(0, BLOCK_C)
            block = tl.load(counts + c[:, None] * BINS + bins[None, :], mask=(c < num_chunks)[:, None], other=0)
            total += tl.sum(block, 0)
            before += tl.sum(tl.where((c < pid)[:, None], block, 0), 0)
    ends = tl.cumsum(total, 0)
    if pid == 0:
        tl.store(offsets + bins, ends, mask=bins < E)
    own = places + pid * BINS  # where this chunk's next row of each bin goes
    tl.store(own + bins, ends - total + before)
    tl.debug_barrier()
    for first in range(start, end, WALK):
        i, j = first + tl.arange(0, WALK), first + tl.arange(0, WALK)
        bin_i, bin_j = _bin(ids, i, i < end, E), _bin(ids, j, j < end, E)
        same = (bin_i[:, None] == bin_j[None, :]) & (j < end)[None, :]
        rank = tl.sum((same & (j[None, :] < i[:, None])).to(tl.int32), 1)
        later = tl.sum((same & (j[None, :] > i[:, None])).to(tl.int32), 1)
        place = tl.load(own + bin_i, mask=i < end, other=0) + rank
        tl.store(order + place.to(tl.int64), i, mask=i < end)
        tl.debug_barrier()
        tl.store(own + bin_i, place + 1, mask=(i < end) & (later == 0))
        tl.debug_barrier()


@on_its_device
def sort_rows(expert_ids_N: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """`(order_N, offsets_E)` of a `Plan`."""
    ids, N = expert_ids_N.contiguous(), len(expert_ids_N)
    if ids.device.type == "cpu" and N and (ids.min() < -1 or ids.max() >= num_experts):
        raise ids_out_of_range(ids, num_experts)
    order_N, offsets_E = torch.empty_like(ids), ids.new_empty(num_experts, dtype=torch.int32)
    alone = N <= _ONE_LAUNCH
    most = 1 if alone else max(1, num_processors(ids.device))
    chunk = triton.cdiv(max(N, 1), max(1, min(most, triton.cdiv(N, _CHUNK))))
    num_chunks = triton.cdiv(max(N, 1), chunk)
    BINS = triton.next_power_of_2(num_experts + 1)
    options = {"num_warps": 8 if BINS > 1024 else 4, "debug": True, "sanitize_overflow": False}
    counts, places = ids.new_empty((2, num_chunks, BINS), dtype=torch.int32)
    if not alone:
        count_kernel[(num_chunks,)](ids, counts, N, num_experts, chunk, BINS, 1024, **options)
    sizes = (N, num_experts, chunk, num_chunks)
    blocks = (BINS, max(1, min(16, 4096 // BINS)), 1024, _WALK)
    place_kernel[(num_chunks,)](ids, counts, places, order_N, offsets_E, *sizes, alone, *blocks, **options)
    return order_N, offsets_E
