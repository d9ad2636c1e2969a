"""Each token gathers its rows, weights them and sums them, in the router's order: no atomics, the same bits always."""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastmoe.kernels.triton.launch import power_of_two


@dataclass(frozen=True)
class Lists:
    """Each token's routed rows: K each, token by token, or those that `row_N` lists up to `end_T`."""

    per_token: int
    row_N: Tensor | None = None
    end_T: Tensor | None = None


def lists_of(token_ids_N: Tensor, num_tokens: int, rows_per_token: int) -> Lists:
    if rows_per_token:
        return Lists(rows_per_token)
    sorted_N, row_N = torch.sort(token_ids_N, stable=True)
    tokens_T = torch.arange(num_tokens, device=token_ids_N.device)
    return Lists(0, row_N, torch.searchsorted(sorted_N, tokens_T, right=True))


@triton.jit
def combine_kernel(
    parts, positions, weights, list_rows, list_ends, offsets, y, N, E, O, K, S,
    BLOCK: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    o = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    routed = tl.load(offsets + E - 1)
    if list_rows is None:
        begin = token * K
        end = begin + K
    else:
        begin = tl.load(list_ends + token - 1, mask=token > 0, other=0)
        end = tl.load(list_ends + token)
    acc = tl.zeros((BLOCK,), tl.float32)
    for n in range(begin, end):
        row = tl.load(list_rows + n) if list_rows is not None else n
        position = tl.load(positions + row).to(tl.int64)
        there = position < routed
        width = O * there.to(tl.int32)
        value = tl.zeros((BLOCK,), tl.float32)
        for s in range(S):
            at = parts + (s * tl.cast(N, tl.int64) + position) * O + o
            value += tl.load(at, mask=o < width, other=0).to(tl.float32)
        if weights is not None:
            value *= tl.load(weights + position, mask=there, other=0)
        acc += value
    tl.store(y + token * O + o, acc.to(y.dtype.element_ty), mask=o < O)


@triton.jit
def combine_backward_kernel(
    grad, rows, tokens, weights, order, offsets, drows, dweights, E, O, NEED_ROWS: tl.constexpr,
    NEED_WEIGHTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0).to(tl.int64)
    there = i < tl.load(offsets + E - 1)
    width = O * there.to(tl.int32)
    token, weight = tl.load(tokens + i).to(tl.int64), tl.load(weights + i)
    dot = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, O, BLOCK):
        o = first + tl.arange(0, BLOCK)
        g = tl.load(grad + token * O + o, mask=o < width, other=0).to(tl.float32)
        if NEED_ROWS:
            share = tl.where(there, g * weight, 0.0)
            tl.store(drows + i * O + o, share.to(drows.dtype.element_ty), mask=o < O)
        if NEED_WEIGHTS:
            dot += g * tl.load(rows + i * O + o, mask=o < width, other=0).to(tl.float32)
    if NEED_WEIGHTS:
        tl.store(dweights + tl.load(order + i), tl.sum(dot, 0).to(dweights.dtype.element_ty))


@triton.jit
def weights_grad_kernel(
    dots, bias, grad, tokens, order, offsets, dweights, N, E, D, C, BLOCK_R: tl.constexpr, BLOCK_E: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    valid = i < tl.load(offsets + E - 1)
    acc = tl.zeros((BLOCK_R,), tl.float32)
    for c in range(C):
        acc += tl.load(dots + c * tl.cast(N, tl.int64) + i, mask=valid, other=0)
    if bias is not None:
        expert = tl.zeros((BLOCK_R,), tl.int64)
        for e0 in range(0, E, BLOCK_E):
            e = e0 + tl.arange(0, BLOCK_E)
            ends = tl.load(offsets + e, mask=e < E, other=2147483647)
            expert += tl.sum((ends[None, :] <= i[:, None]).to(tl.int32), 1)
        token = tl.load(tokens + i, mask=valid, other=0).to(tl.int64)
        for first in range(0, D, BLOCK_D):
            d = first + tl.arange(0, BLOCK_D)
            mask = valid[:, None] & (d < D)[None, :]
            b = tl.load(bias + expert[:, None] * D + d[None, :], mask=mask, other=0).to(tl.float32)
            g = tl.load(grad + token[:, None] * D + d[None, :], mask=mask, other=0).to(tl.float32)
            acc += tl.sum(b * g, 1)
    n = tl.load(order + i, mask=i < N, other=0)
    tl.store(dweights + n, acc.to(dweights.dtype.element_ty), mask=i < N)


def combine(
    parts_SNO: Tensor,
    position_N: Tensor,
    weight_N: Tensor | None,
    offsets_E: Tensor,
    num_tokens: int,
    lists: Lists,
    dtype: torch.dtype,
) -> Tensor:
    """`(T, O)`: each token's sum, weighted where sorted weights are given, of rows that are sums of S parts."""
    S, N, O = parts_SNO.shape
    y_TO = parts_SNO.new_empty((num_tokens, O), dtype=dtype)
    BLOCK = power_of_two(O, 16, 1024)
    if y_TO.numel():
        combine_kernel[(num_tokens, triton.cdiv(O, BLOCK))](
            parts_SNO, position_N, weight_N, lists.row_N, lists.end_T, offsets_E, y_TO, N, len(offsets_E), O,
            lists.per_token, S, BLOCK,
        )  # fmt: skip
    return y_TO


def combine_backward(
    grad_TO: Tensor,
    rows_NO: Tensor,
    token_N: Tensor,
    weight_N: Tensor,
    order_N: Tensor,
    offsets_E: Tensor,
    dtype: torch.dtype,
    needed: list[bool],
) -> list[Tensor | None]:
    """Gradients of rows and, in `dtype` and the rows' original order, of weights."""
    N, O = rows_NO.shape
    drows = torch.empty_like(rows_NO) if needed[0] else None
    dweights = weight_N.new_empty(N, dtype=dtype) if needed[1] else None
    if N:
        combine_backward_kernel[(N,)](
            grad_TO, rows_NO, token_N, weight_N, order_N, offsets_E, drows, dweights, len(offsets_E), O, *needed,
            power_of_two(O, 16, 1024),
        )  # fmt: skip
    return [drows, dweights]


def weights_grad(
    dots_CN: Tensor,
    b2: Tensor | None,
    grad_TD: Tensor,
    token_N: Tensor,
    order_N: Tensor,
    offsets_E: Tensor,
    dtype: torch.dtype,
) -> Tensor:
    """`sum(dots) + <b2[e], grad>` of each row, in the rows' original order."""
    (C, N), E, D = dots_CN.shape, len(offsets_E), grad_TD.shape[1]
    dweights_N = dots_CN.new_empty(N, dtype=dtype)
    if N:
        weights_grad_kernel[(triton.cdiv(N, 32),)](
            dots_CN, b2, grad_TD, token_N, order_N, offsets_E, dweights_N, N, E, D, C, 32,
            min(128, triton.next_power_of_2(E)), power_of_two(D, 16, 128),
        )  # fmt: skip
    return dweights_N
