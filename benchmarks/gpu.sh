#!/usr/bin/env bash
# Everything that needs a GPU, in one go. Installs nothing: python3 needs torch, pytest and pytest-timeout.
#   bash benchmarks/gpu.sh [FOLDER FOR RESULTS]
set -euo pipefail
cd "$(dirname "$0")/.."
out=${1:-benchmarks/results}
mkdir -p "$out"
export PYTHONPATH="$PWD" PYTHONUNBUFFERED=1
python3 -m pytest -m gpu -p no:cacheprovider tests/test_gpu.py 2>&1 | tee "$out/gpu_tests.txt"
python3 benchmarks/bench_gpu.py gpu fastmoe-paper --out "$out"
