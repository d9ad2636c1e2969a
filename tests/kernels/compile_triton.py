"""Compiles every Triton kernel for a GPU that need not be there: `python compile_triton.py cuda 90`, or `hip gfx942`.

The passes are run on CPU tensors with launches replaced by compilation. Prints one JSON line a kernel: its name, its
shared memory in bytes and, on NVIDIA, what `ptxas` counted. Triton's interpreter must be off.
"""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from fastmoe import kernels
from fastmoe.kernels.triton import mlp, product, score, sort, tiles, weight_grad

WARP = {"cuda": 32, "hip": 64}
seen: dict[str, None] = {}


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
            seen[kernel.hash] = None
            used = resources(kernel.asm["cubin"]) if "cubin" in kernel.asm else {}
            asm = kernel.asm.get("ttgir", "")
            facts = {"tma": "tma" in asm or "tensordesc" in asm, "mma": "dot" in asm or "mma" in asm}
            print(json.dumps({"name": kernel.name, "shared": kernel.metadata.shared, **used, **facts}), flush=True)
        return kernel

    driver.set_active(NoDriver(target))
    JITFunction.run = warmup


def resources(cubin: bytes) -> dict[str, int]:
    """Registers of a thread, and bytes that it keeps in local memory."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
        text = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    return {name: int(re.search(rf"{name}:(\d+)", text)[1]) for name in ("REG", "STACK")}


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


def everything(dtype: torch.dtype) -> None:
    for rows, num_experts in ((1, 1), (1, 8), (64, 8), (2100, 3), (2100, 4096)):
        sort.sort_rows(torch.zeros(rows, dtype=torch.int64), num_experts)
    for E, K in ((1, 1), (5, 2), (128, 8), (1024, 16)):
        for softmax in (True, False):
            for normalize in (True, False):
                logits = torch.zeros(3, E)
                made = score.score_topk(logits, K, softmax, normalize)
                score.score_topk_backward(logits, made[1], logits, *made, softmax, normalize)
    for T, E, K in ((1, 4, 1), (1, 8, 8), (64, 8, 2), (512, 8, 2), (2048, 4, 2)):
        for activation, bias in (("gelu", True), ("swiglu", False)):
            whole_mlp(T, E, K, 256, 512, activation, dtype, bias)
    for activation in ("relu", "gelu_tanh", "silu"):
        whole_mlp(512, 8, 2, 256, 512, activation, dtype, False)
    whole_mlp(100, 8, 2, 129, 65, "swiglu", dtype, True)
    weight_grad.num_processors = lambda device: 1  # as if matrices were large: no pieces
    whole_mlp(512, 8, 2, 256, 512, "relu", dtype, True)
    rows, offsets = torch.arange(8), torch.zeros(2, dtype=torch.int32)
    mlp.combine_rows(torch.empty(8, 6, dtype=dtype), rows, torch.empty(8), rows, offsets, 8)
    mlp.combine_rows_backward(
        torch.empty(8, 6, dtype=dtype), torch.empty(8, 6, dtype=dtype), rows, torch.empty(8), rows, offsets, [True] * 2
    )


def main(kind: str, arch: str) -> None:
    name = arch if kind == "hip" else f"sm{arch}"
    compile_only(GPUTarget(kind, arch if kind == "hip" else int(arch), WARP[kind]))
    tiles.family = lambda device: name
    for module in (sort, weight_grad, product):
        module.num_processors = lambda device: 132
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        everything(dtype)


if __name__ == "__main__":
    main(*sys.argv[1:])
