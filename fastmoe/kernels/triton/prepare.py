"""What a plan means for the products: each sorted row's token and weight, and row tiles that never span two experts.

How many tiles an expert has is known on the device alone. Tables of tiles have room for as many as there can be, and a
count; the kernels walk them without asking the host.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor


@dataclass(frozen=True)
class Tiles:
    """Row tiles of at most `height` rows: the expert and first row of each, `(S,)`; how many there are, `(1,)`."""

    expert_S: Tensor
    start_S: Tensor
    total_1: Tensor
    offsets_E: Tensor
    height: int


@dataclass(frozen=True)
class Rows:
    """For each sorted position its token, int32, and float32 weight; for each routed row its position, int32."""

    token_N: Tensor
    weight_N: Tensor
    position_N: Tensor


@triton.jit
def _tile_slots(offsets, experts, starts, total, block, E, height, num_slots, AT_LEAST_ONE: tl.constexpr,
                BLOCK_S: tl.constexpr, BLOCK_E: tl.constexpr):  # fmt: skip
    slot = block * BLOCK_S + tl.arange(0, BLOCK_S)
    expert = tl.zeros((BLOCK_S,), tl.int32)
    first = tl.zeros((BLOCK_S,), tl.int32)
    row = tl.zeros((BLOCK_S,), tl.int32)
    running = 0
    for e0 in range(0, E, BLOCK_E):
        e = e0 + tl.arange(0, BLOCK_E)
        end = tl.load(offsets + e, mask=e < E, other=0)
        count = end - tl.load(offsets + e - 1, mask=(e < E) & (e > 0), other=0)
        tiles = count // height + (count % height != 0).to(tl.int32)
        if AT_LEAST_ONE:
            tiles = tl.maximum(tiles, 1)
        tiles = tl.where(e < E, tiles, 0)
        ends = running + tl.cumsum(tiles, 0)
        passed = (ends[None, :] <= slot[:, None]) & (e < E)[None, :]
        expert += tl.sum(passed.to(tl.int32), 1)
        first = tl.maximum(first, tl.max(tl.where(passed, ends[None, :], 0), 1))
        row = tl.maximum(row, tl.max(tl.where(passed, end[None, :], 0), 1))
        running += tl.sum(tiles, 0)
    tl.store(experts + slot, expert, mask=slot < num_slots)
    tl.store(starts + slot, row + (slot - first) * height, mask=slot < num_slots)
    if block == 0:
        tl.store(total, running)


@triton.jit
def prepare_kernel(
    offsets, experts, starts, total, order, token_ids, weights, tokens, sorted_weights, positions,
    N, T, E, height, num_slots, slot_programs,
    AT_LEAST_ONE: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    if pid < slot_programs:
        _tile_slots(offsets, experts, starts, total, pid, E, height, num_slots, AT_LEAST_ONE, BLOCK_S, BLOCK_E)
    elif order is not None:
        i = (pid - slot_programs).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
        n = tl.load(order + i, mask=i < N, other=0)
        token = tl.load(token_ids + n, mask=i < N, other=0)
        tl.device_assert((token >= 0) & (token < T), "a token id is out of range")
        tl.store(tokens + i, token.to(tl.int32), mask=i < N)
        tl.store(sorted_weights + i, tl.load(weights + n, mask=i < N, other=0).to(tl.float32), mask=i < N)
        tl.store(positions + n, i.to(tl.int32), mask=i < N)


def prepare(
    order_N: Tensor, offsets_E: Tensor, token_ids_N: Tensor, weights_N: Tensor, num_tokens: int, height: int
) -> tuple[Rows, Tiles]:
    """One launch for both. A token id out of range stops the device, as PyTorch's own indexing does."""
    N = len(order_N)
    if N and token_ids_N.device.type == "cpu" and not 0 <= token_ids_N.min() <= token_ids_N.max() < num_tokens:
        raise ValueError(f"token ids must lie in 0..{num_tokens - 1}")  # the interpreter asserts nothing
    rows = Rows(
        order_N.new_empty(N, dtype=torch.int32),
        order_N.new_empty(N, dtype=torch.float32),
        order_N.new_empty(N, dtype=torch.int32),
    )
    tiles = _new_tiles(N, offsets_E, height, False)
    _launch(tiles, False, order_N, token_ids_N.contiguous(), weights_N.contiguous(), rows, num_tokens)
    return rows, tiles


def tiles_of(offsets_E: Tensor, num_rows: int, height: int, at_least_one: bool = False) -> Tiles:
    """The tiles alone; `at_least_one`: an expert without a row gets a tile too."""
    tiles = _new_tiles(num_rows, offsets_E, height, at_least_one)
    _launch(tiles, at_least_one, None, None, None, None, 0)
    return tiles


def _new_tiles(N: int, offsets_E: Tensor, height: int, at_least_one: bool) -> Tiles:
    num_slots = N // height + (len(offsets_E) if at_least_one else min(len(offsets_E), N))
    expert_S, start_S = offsets_E.new_empty((2, num_slots))
    return Tiles(expert_S, start_S, offsets_E.new_empty(1), offsets_E, height)


def _launch(
    tiles: Tiles,
    at_least_one: bool,
    order_N: Tensor | None,
    token_ids_N: Tensor | None,
    weights_N: Tensor | None,
    rows: Rows | None,
    num_tokens: int,
) -> None:
    E, num_slots, BLOCK_S, BLOCK_N = len(tiles.offsets_E), len(tiles.expert_S), 64, 512
    slot_programs = max(1, triton.cdiv(num_slots, BLOCK_S))
    N = 0 if order_N is None else len(order_N)
    made = (None,) * 3 if rows is None else (rows.token_N, rows.weight_N, rows.position_N)
    prepare_kernel[(slot_programs + triton.cdiv(N, BLOCK_N),)](
        tiles.offsets_E, tiles.expert_S, tiles.start_S, tiles.total_1, order_N, token_ids_N, weights_N, *made,
        N, num_tokens, E, tiles.height, num_slots, slot_programs,
        at_least_one, BLOCK_S, min(128, triton.next_power_of_2(E)), BLOCK_N, debug=True, sanitize_overflow=False,
    )  # fmt: skip
