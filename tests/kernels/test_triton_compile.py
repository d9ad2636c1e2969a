"""Every Triton kernel, compiled for GPUs that this machine need not have."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

SHARED = {"80": 163 << 10, "89": 99 << 10, "90": 227 << 10, "100": 227 << 10, "gfx942": 64 << 10}
"""Bytes of shared memory that one program may have."""
SPILLED = 256
"""Bytes of a thread's registers that may lie in memory: a tile that takes more is too large."""


def compiled(tmp_path, kind, arch, *dtypes):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"TRITON_CACHE_DIR": str(tmp_path)}
    script = Path(__file__).with_name("compile_triton.py")
    run = subprocess.run(
        [sys.executable, script, kind, arch, *dtypes], capture_output=True, text=True, env=environment, timeout=1500
    )
    assert run.returncode == 0, run.stderr[-3000:]
    return [json.loads(line) for line in run.stdout.splitlines()]


def check(kernels, arch):
    assert {"forward_kernel", "backward_kernel", "product_kernel", "weight_grad_kernel"} <= {k["name"] for k in kernels}
    for kernel in kernels:
        assert kernel["shared"] <= SHARED[arch], kernel
        assert kernel["odd"] or kernel.get("STACK", 0) <= SPILLED, kernel


def test_for_hopper(tmp_path):
    kernels = compiled(tmp_path, "cuda", "90", "bfloat16", "quick")
    check(kernels, "90")
    for name in ("forward_kernel", "backward_kernel", "product_kernel"):
        assert any(k["tma"] and k["wgmma"] for k in kernels if k["name"] == name), name
    assert any(k["wgmma"] for k in kernels if k["name"] == "weight_grad_kernel")


@pytest.mark.slow
@pytest.mark.timeout(1500)
@pytest.mark.parametrize(
    ("kind", "arch"), [("cuda", "80"), ("cuda", "89"), ("cuda", "90"), ("cuda", "100"), ("hip", "gfx942")]
)
def test_for_every_family(tmp_path, kind, arch):
    check(compiled(tmp_path, kind, arch, "float32", "bfloat16", "float16"), arch)
