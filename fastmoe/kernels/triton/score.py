"""Scores, the K best of each token and their weights, in one launch; backward in another. All in float32.

Normalised weights are the softmax of the chosen logits (of their log-sigmoids), so no sum can be zero.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastmoe.kernels.triton.launch import on_its_device, power_of_two

MAX_EXPERTS, MAX_K = 1024, 16


@triton.jit
def _log_sigmoid(z):
    return tl.minimum(z, 0.0) - tl.log(1 + tl.exp(-tl.abs(z)))


@triton.jit
def _load(logits, t, e, T, E):
    mask = (t < T)[:, None] & (e < E)[None, :]
    return tl.load(logits + t.to(tl.int64)[:, None] * E + e[None, :], mask=mask, other=float("-inf")).to(
        tl.float32
    ), mask


@triton.jit
def score_kernel(logits, scores, weights, ids, T, E, K: tl.constexpr, SOFTMAX: tl.constexpr, NORMALIZE: tl.constexpr,
                 BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_K: tl.constexpr):  # fmt: skip
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    e, k = tl.arange(0, BLOCK_E), tl.arange(0, BLOCK_K)
    z, mask = _load(logits, t, e, T, E)
    z = tl.where((t < T)[:, None], z, 0.0)
    best = tl.max(z, 1)
    if SOFTMAX:
        powers = tl.where((e < E)[None, :], tl.exp(z - best[:, None]), 0.0)
        s = powers / tl.sum(powers, 1)[:, None]
    else:
        s = tl.sigmoid(z)
    at = t.to(tl.int64)[:, None] * E + e[None, :]
    tl.store(scores + at, s, mask=mask)
    # a logit that is NaN or infinite is chosen first, as by torch.topk; then what else has no score because of it
    rank = tl.where(z < float("inf"), tl.where(s == s, s, 2.0), float("inf"))
    left = tl.where((e < E)[None, :], rank, -1.0)
    chosen = tl.zeros((BLOCK_T, BLOCK_K), tl.float32)
    taken_z = tl.full((BLOCK_T, BLOCK_K), float("-inf"), tl.float32)
    taken = tl.zeros((BLOCK_T, BLOCK_K), tl.int32)
    for j in tl.static_range(K):
        top = tl.max(left, 1)
        first = tl.min(tl.where(left == top[:, None], e[None, :], BLOCK_E), 1)
        here = e[None, :] == first[:, None]
        column = (k == j)[None, :]
        chosen = tl.where(column, tl.sum(tl.where(here, s, 0.0), 1)[:, None], chosen)
        taken_z = tl.where(column, tl.sum(tl.where(here, z, 0.0), 1)[:, None], taken_z)
        taken = tl.where(column, first[:, None], taken)
        left = tl.where(here, -2.0, left)
    if NORMALIZE:
        logs = taken_z if SOFTMAX else tl.where((k < K)[None, :], _log_sigmoid(taken_z), float("-inf"))
        powers = tl.exp(logs - tl.max(logs, 1)[:, None])
        chosen = powers / tl.sum(powers, 1)[:, None]
    out = t.to(tl.int64)[:, None] * K + k[None, :]
    kept = (t < T)[:, None] & (k < K)[None, :]
    tl.store(weights + out, chosen, mask=kept)
    tl.store(ids + out, taken.to(tl.int64), mask=kept)


@triton.jit
def score_backward_kernel(
    dscores, dweights, scores, weights, ids, logits, dlogits, T, E, K: tl.constexpr, SOFTMAX: tl.constexpr,
    NORMALIZE: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    e, k = tl.arange(0, BLOCK_E), tl.arange(0, BLOCK_K)
    mask = (t < T)[:, None] & (e < E)[None, :]
    at = t.to(tl.int64)[:, None] * E + e[None, :]
    s = tl.load(scores + at, mask=mask, other=0)
    ds = tl.load(dscores + at, mask=mask, other=0)
    own = t.to(tl.int64)[:, None] * K + k[None, :]
    kept = (t < T)[:, None] & (k < K)[None, :]
    dot = tl.zeros((BLOCK_T,), tl.float32)
    if NORMALIZE:
        dot = tl.sum(tl.load(weights + own, mask=kept, other=0) * tl.load(dweights + own, mask=kept, other=0), 1)
    direct = tl.zeros((BLOCK_T, BLOCK_E), tl.float32)  # to the logits themselves
    if not SOFTMAX:
        rest = tl.sigmoid(-tl.load(logits + at, mask=mask, other=0))  # 1 - s, which would lose digits near 1
    for j in tl.static_range(K):
        one = t.to(tl.int64) * K + j
        here = e[None, :] == tl.load(ids + one, mask=t < T, other=-1)[:, None]
        dw = tl.load(dweights + one, mask=t < T, other=0)
        if NORMALIZE:
            share = tl.load(weights + one, mask=t < T, other=0) * (dw - dot)
            direct += tl.where(here, share[:, None] if SOFTMAX else share[:, None] * rest, 0.0)
        else:
            ds += tl.where(here, dw[:, None], 0.0)
    dz = s * (ds - tl.sum(s * ds, 1)[:, None]) if SOFTMAX else ds * s * rest
    tl.store(dlogits + at, (dz + direct).to(dlogits.dtype.element_ty), mask=mask)


def _blocks(E: int, K: int) -> tuple[int, int, int]:
    BLOCK_E = power_of_two(E, 16, MAX_EXPERTS)
    return max(1, min(32, 2048 // BLOCK_E)), BLOCK_E, power_of_two(K, 2, MAX_K)


@on_its_device
def score_topk(logits_TE: Tensor, top_k: int, softmax: bool, normalize: bool) -> tuple[Tensor, Tensor, Tensor]:
    """`(scores_TE, weights_TK, expert_ids_TK)`: float32, float32, int64; among equal scores the lowest expert."""
    T, E = logits_TE.shape
    scores_TE = logits_TE.new_empty((T, E), dtype=torch.float32)
    weights_TK = logits_TE.new_empty((T, top_k), dtype=torch.float32)
    ids_TK = logits_TE.new_empty((T, top_k), dtype=torch.int64)
    blocks = _blocks(E, top_k)
    if T:
        score_kernel[(triton.cdiv(T, blocks[0]),)](
            logits_TE, scores_TE, weights_TK, ids_TK, T, E, top_k, softmax, normalize, *blocks
        )
    return scores_TE, weights_TK, ids_TK


@on_its_device
def score_topk_backward(
    dscores_TE: Tensor,
    dweights_TK: Tensor,
    logits_TE: Tensor,
    scores_TE: Tensor,
    weights_TK: Tensor,
    ids_TK: Tensor,
    softmax: bool,
    normalize: bool,
) -> Tensor:
    """The gradient of the logits."""
    (T, E), K = logits_TE.shape, weights_TK.shape[1]
    dlogits_TE = torch.empty_like(logits_TE)
    blocks = _blocks(E, K)
    if T:
        score_backward_kernel[(triton.cdiv(T, blocks[0]),)](
            dscores_TE, dweights_TK, scores_TE, weights_TK, ids_TK, logits_TE, dlogits_TE, T, E, K, softmax, normalize,
            *blocks,
        )  # fmt: skip
    return dlogits_TE
