"""Compiles every Triton kernel for a GPU that need not be there: `python compile_triton.py cuda 90 bfloat16`.

The passes are run on CPU tensors with launches replaced by compilation. Prints one JSON line a kernel: its name, its
shared memory in bytes and, on NVIDIA, what the assembler counted and which instructions it holds. With `quick` behind
the dtypes, a few kernels of each kind. Triton's interpreter must be off.
"""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from fastmoe import kernels
from fastmoe.kernels.triton import mlp, product, score, sort, tiles, weight_grad

WARP = {"cuda": 32, "hip": 64}
seen: set[str] = set()
facts = {"odd": False}
"""What is said of every kernel: whether sizes were odd, so that no load is wide."""


class NoDriver:
    """What Triton asks of a driver before it compiles."""

    def __init__(self, target: GPUTarget) -> None:
        self.target = target

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def compile_only(target: GPUTarget) -> None:
    run = JITFunction.run

    def warmup(self, *args, grid, warmup, **kwargs):
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        if kernel is not None and kernel.hash not in seen:
            seen.add(kernel.hash)
            used = resources(kernel.asm["cubin"], kernel.asm["ptx"]) if "cubin" in kernel.asm else {}
            print(json.dumps({"name": kernel.name, "shared": kernel.metadata.shared, **used, **facts}), flush=True)
        return kernel

    driver.set_active(NoDriver(target))
    JITFunction.run = warmup


def resources(cubin: bytes, ptx: str) -> dict[str, int]:
    """Registers of a thread, bytes that it keeps in local memory, and whether some instructions are there."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
        text = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    counted = {name: int(re.search(rf"{name}:(\d+)", text)[1]) for name in ("REG", "STACK")}
    return counted | {"tma": "cp.async.bulk.tensor" in ptx, "wgmma": "wgmma.mma_async" in ptx}


def whole_mlp(T: int, E: int, K: int, D: int, H: int, activation: str, dtype: torch.dtype, bias: bool) -> None:
    width = H * (1 + kernels.get_activation(activation).gated)
    x, w1, w2 = torch.empty(T, D, dtype=dtype), torch.empty(E, width, D, dtype=dtype), torch.empty(E, D, H, dtype=dtype)
    b1, b2 = (torch.empty(E, width, dtype=dtype), torch.empty(E, D, dtype=dtype)) if bias else (None, None)
    N = T * K
    order, offsets = torch.arange(N), torch.zeros(E, dtype=torch.int32)
    rows = (torch.arange(N) // K, order, offsets)
    for per_token in (K, 0):
        _, pre = mlp.mlp_forward(x, torch.empty(N), w1, b1, w2, b2, *rows, activation, per_token, True)
        mlp.mlp_forward(x, torch.empty(N), w1, b1, w2, b2, *rows, activation, per_token, False)
        needed = (True, True, True, bias, True, bias)
        mlp.mlp_backward(x, x, torch.empty(N), w1, b1, w2, b2, *rows, pre, activation, per_token, needed)


def passes(dtype: torch.dtype, quick: bool) -> None:
    for rows, num_experts in (
        ((1, 1), (2100, 128)) if quick else ((1, 1), (64, 8), (2100, 3), (2100, 128), (2100, 4096))
    ):
        sort.sort_rows(torch.zeros(rows, dtype=torch.int64), num_experts)
    for E, K in ((128, 8),) if quick else ((1, 1), (5, 2), (128, 8), (1024, 16)):
        for softmax in (True, False):
            for normalize in (True, False):
                logits = torch.zeros(3, E)
                made = score.score_topk(logits, K, softmax, normalize)
                score.score_topk_backward(logits, made[1], logits, *made, softmax, normalize)
    for T, E, K in (
        ((1, 8, 8), (2048, 4, 2)) if quick else ((1, 4, 1), (1, 8, 8), (64, 8, 2), (512, 8, 2), (2048, 4, 2))
    ):
        for activation, bias in (("swiglu", False),) if quick else (("gelu", True), ("swiglu", False)):
            whole_mlp(T, E, K, 256, 512, activation, dtype, bias)
    with mock.patch.dict(facts, odd=True):
        whole_mlp(100, 8, 2, 129, 65, "geglu", dtype, True)
    if not quick:
        for activation in ("relu", "gelu_tanh", "silu"):
            whole_mlp(512, 8, 2, 256, 512, activation, dtype, False)
    with mock.patch.object(weight_grad, "num_processors", return_value=1):  # as if matrices were large: no pieces
        whole_mlp(512, 8, 2, 256, 512, "relu", dtype, True)
    rows, weights, ends = (
        torch.empty(640, 512, dtype=dtype),
        torch.empty(4, 256, 512, dtype=dtype),
        torch.zeros(4).int(),
    )
    bias, grads = torch.empty(4, 256, dtype=dtype), torch.empty(640, 256, dtype=dtype)
    for given in (None, bias):
        mlp.grouped_mm(rows, weights, given, ends)
        mlp.grouped_mm_backward(grads, rows, weights, ends, [True, True, given is not None])
    rows, offsets, values = torch.arange(8), torch.zeros(2, dtype=torch.int32), torch.empty(8, 6, dtype=dtype)
    mlp.combine_rows(values, rows, torch.empty(8), rows, offsets, 8)
    mlp.combine_rows_backward(values, values, rows, torch.empty(8), rows, offsets, [True] * 2)


def main(kind: str, arch: str, *dtypes: str) -> None:
    name = arch if kind == "hip" else f"sm{arch}"
    compile_only(GPUTarget(kind, arch if kind == "hip" else int(arch), WARP[kind]))
    tiles.family = lambda device: name
    for module in (sort, weight_grad, product):
        module.num_processors = lambda device: 132
    for dtype in dtypes:
        if dtype != "quick":
            passes(getattr(torch, dtype), "quick" in dtypes)


if __name__ == "__main__":
    main(*sys.argv[1:])
