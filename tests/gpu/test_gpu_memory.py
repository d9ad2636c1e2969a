"""What a pass keeps and what it takes at most; and no kernel reads or writes what is not its own."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from gpu_cases import half, on_both, on_gpu

from fastmoe.bench.kept import memory_of
from fastmoe.bench.plain import ours
from fastmoe.bench.problem import Problem

pytest.importorskip("triton")

SMALL_CASE = Path(__file__).with_name("small_case.py")
INDEX_BYTES = 48  # of each routed row: its token, weight, place, list and place in it; and as much again for copies
SLACK = 4 << 20
PIECES = 160 << 20  # of weight gradients, whatever the problem: four tiles for each processor, in float32


@on_both
@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
def test_ceilings(device, activation):
    T, E, D, H, K = shape = (16384, 8, 1024, 2048, 4) if device == "cuda" else (4, 2, 16, 256, 2)
    p = Problem(shape, half(device), activation, device)
    contender = ours(p, "triton")
    contender.step()  # compiles
    found, N, size = memory_of(p, contender), T * K, p.dtype.itemsize
    assert found["formula_bytes"] == size * (T * D + N * H * (1 + p.gated))
    assert found["formula_bytes"] <= found["kept_bytes"] <= found["formula_bytes"] + INDEX_BYTES * N + 8 * E
    if device == "cpu":
        return
    kept = found["kept_bytes"] - p.x_TD.nbytes  # x was there before
    assert found["allocated_bytes"] <= kept + INDEX_BYTES * N + SLACK
    # forward: what is kept, the activated rows, the second product's rows, the output
    assert found["forward_peak_bytes"] <= kept + size * (N * (H + D) + T * D) + INDEX_BYTES * N + SLACK
    # backward: gradients of pre-activations, beside either the activated rows or the last product's; dots in float32
    rows = N * (H * (1 + p.gated) + max(H, D)) + T * D
    dots = 4 * N * H // 64
    assert found["backward_peak_bytes"] <= size * rows + dots + INDEX_BYTES * N + PIECES + SLACK


@on_both
def test_the_small_case(device):
    """What the sanitizer runs."""
    environment = os.environ | ({"TRITON_INTERPRET": "1"} if device == "cpu" else {})
    subprocess.run([sys.executable, SMALL_CASE, device], check=True, timeout=120, env=environment)


@on_gpu
@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
def test_compute_sanitizer(tool):
    sanitizer = shutil.which("compute-sanitizer")
    if sanitizer is None:
        pytest.skip("no compute-sanitizer on the PATH")
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    command = [sanitizer, "--tool", tool, "--error-exitcode", "9", sys.executable, SMALL_CASE, "cuda"]
    run = subprocess.run(command, capture_output=True, text=True, timeout=150, env=environment)
    assert run.returncode == 0, (run.stdout + run.stderr)[-4000:]
