"""Activations inside kernels, and the two kernels that apply them by themselves, where no product does it on the way.

All in float32. `z` is the pre-activation; of a gated activation the gate half.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastmoe.kernels.activations import get_activation
from fastmoe.kernels.triton.launch import power_of_two

_BASE = {"reglu": "relu", "geglu": "gelu", "geglu_tanh": "gelu_tanh", "swiglu": "silu"}


def base(activation: str) -> tuple[str, bool]:
    """`(name of the function of one value, gated)`."""
    return _BASE.get(activation, activation), get_activation(activation).gated


@triton.jit
def act(z, KIND: tl.constexpr):
    if KIND == "relu":
        h = tl.where(z < 0, 0.0, z)  # a NaN stays one
    elif KIND == "gelu":
        h = 0.5 * z * (1 + tl.erf(z * 0.7071067811865476))
    elif KIND == "gelu_tanh":  # 0.5 z (1 + tanh u) = z sigmoid(2u)
        h = z * tl.sigmoid(1.5957691216057308 * z * (1 + 0.044715 * z * z))
    else:
        tl.static_assert(KIND == "silu")
        h = z * tl.sigmoid(z)
    return h


@triton.jit
def act_grad(z, KIND: tl.constexpr):
    if KIND == "relu":
        slope = tl.where(z <= 0, 0.0, 1.0)
    elif KIND == "gelu":
        slope = 0.5 * (1 + tl.erf(z * 0.7071067811865476)) + z * 0.3989422804014327 * tl.exp(-0.5 * z * z)
    elif KIND == "gelu_tanh":
        u = 1.5957691216057308 * z * (1 + 0.044715 * z * z)
        s = tl.sigmoid(u)
        slope = s + z * s * tl.sigmoid(-u) * 1.5957691216057308 * (1 + 0.134145 * z * z)  # 1 - s would lose digits
    else:
        tl.static_assert(KIND == "silu")
        s = tl.sigmoid(z)
        slope = s * (1 + z * (1 - s))
    return slope


@triton.jit
def activation_grads(z, up, dhidden, weight, KIND: tl.constexpr, GATED: tl.constexpr):
    """`(hidden, dz, dup)` for rows whose output is multiplied by `weight`; dup is only meant if gated."""
    h = act(z, KIND)
    weighted = dhidden * weight[:, None]
    dz = act_grad(z, KIND) * weighted
    if GATED:
        grads = h * up, dz * up, h * weighted
    else:
        grads = h, dz, dz
    return grads


@triton.jit
def activate_kernel(parts, hidden, pre, offsets, N, E, H, S, KIND: tl.constexpr, GATED: tl.constexpr,
                    BLOCK_R: tl.constexpr, BLOCK_H: tl.constexpr):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    h = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    mask = (rows < tl.load(offsets + E - 1))[:, None] & (h < H)[None, :]
    W = H * (1 + GATED)
    at = rows[:, None] * W + h[None, :]
    z = tl.zeros((BLOCK_R, BLOCK_H), tl.float32)
    up = tl.zeros((BLOCK_R, BLOCK_H), tl.float32)
    for s in range(S):
        part = parts + tl.cast(s, tl.int64) * N * W
        z += tl.load(part + at, mask=mask, other=0).to(tl.float32)
        if GATED:
            up += tl.load(part + at + H, mask=mask, other=0).to(tl.float32)
    value = act(z, KIND) * up if GATED else act(z, KIND)
    tl.store(hidden + rows[:, None] * H + h[None, :], value.to(hidden.dtype.element_ty), mask=mask)
    if pre is not None:
        tl.store(pre + at, z.to(pre.dtype.element_ty), mask=mask)
        if GATED:
            tl.store(pre + at + H, up.to(pre.dtype.element_ty), mask=mask)


@triton.jit
def activate_backward_kernel(
    dhidden, pre, weights, hidden, dpre, dots, offsets, N, E, H, KIND: tl.constexpr, GATED: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    column = tl.program_id(1)
    h = column * BLOCK_H + tl.arange(0, BLOCK_H)
    valid = rows < tl.load(offsets + E - 1)
    mask = valid[:, None] & (h < H)[None, :]
    dh = tl.load(dhidden + rows[:, None] * H + h[None, :], mask=mask, other=0).to(tl.float32)
    weight = tl.load(weights + rows, mask=valid, other=0)
    store_activation_grads(dh, column, weight, pre, hidden, dpre, dots, rows, valid, N, H, KIND, GATED)


@triton.jit
def store_activation_grads(
    dh, column, weight, pre, hidden, dpre, dots, rows, valid, N, H, KIND: tl.constexpr, GATED: tl.constexpr
):
    """From a tile of the gradient of the hidden activations, the `column`th of its width: that of the pre-activations,
    the weighted hidden activations, unless `hidden` is None, and each row's share of `<hidden, dhidden>`, the gradient
    of its weight."""
    rows = rows.to(tl.int64)
    h = column * dh.shape[1] + tl.arange(0, dh.shape[1])
    mask = valid[:, None] & (h < H)[None, :]
    at = rows[:, None] * (H * (1 + GATED)) + h[None, :]
    z = tl.load(pre + at, mask=mask, other=0).to(tl.float32)
    up = tl.load(pre + at + H, mask=mask, other=0).to(tl.float32) if GATED else z
    value, dz, dup = activation_grads(z, up, dh, weight, KIND, GATED)
    tl.store(dots + tl.cast(column, tl.int64) * N + rows, tl.sum(value * dh, 1), mask=valid)
    if hidden is not None:
        out = (value * weight[:, None]).to(hidden.dtype.element_ty)
        tl.store(hidden + rows[:, None] * H + h[None, :], out, mask=mask)
    tl.store(dpre + at, dz.to(dpre.dtype.element_ty), mask=mask)
    if GATED:
        tl.store(dpre + at + H, dup.to(dpre.dtype.element_ty), mask=mask)


def activate(
    parts_SNW: Tensor, offsets_E: Tensor, activation: str, dtype: torch.dtype, keep: bool
) -> tuple[Tensor, Tensor]:
    """`(hidden_NH, pre_NW)` of a sum of S parts; pre is empty unless `keep`."""
    kind, gated = base(activation)
    S, N, W = parts_SNW.shape
    H = W // (1 + gated)
    hidden_NH = parts_SNW.new_empty((N, H), dtype=dtype)
    pre_NW = parts_SNW.new_empty((N, W) if keep else (0,), dtype=dtype)
    BLOCK_H = power_of_two(H, 16, 256)
    grid = (triton.cdiv(N, 16), triton.cdiv(H, BLOCK_H))
    activate_kernel[grid](
        parts_SNW, hidden_NH, pre_NW if keep else None, offsets_E, N, len(offsets_E), H, S, kind, gated, 16, BLOCK_H
    )
    return hidden_NH, pre_NW


def activate_backward(
    dhidden_NH: Tensor, pre_NW: Tensor, weight_N: Tensor, offsets_E: Tensor, activation: str, need_hidden: bool
) -> tuple[Tensor, Tensor | None, Tensor]:
    """`(dpre_NW, weighted hidden_NH, dots_CN)`; dots are parts of the weights' gradients, to be summed."""
    kind, gated = base(activation)
    N, H = dhidden_NH.shape
    BLOCK_H = power_of_two(H, 16, 256)
    columns = triton.cdiv(H, BLOCK_H)
    dpre_NW, hidden_NH = torch.empty_like(pre_NW), torch.empty_like(dhidden_NH) if need_hidden else None
    dots_CN = weight_N.new_empty(columns, N)
    activate_backward_kernel[(triton.cdiv(N, 16), columns)](
        dhidden_NH,
        pre_NW,
        weight_N,
        hidden_NH,
        dpre_NW,
        dots_CN,
        offsets_E,
        N,
        len(offsets_E),
        H,
        kind,
        gated,
        16,
        BLOCK_H,
    )
    return dpre_NW, hidden_NH, dots_CN
