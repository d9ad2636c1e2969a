#!/usr/bin/env bash
# Everything that needs a GPU, in one go and within nine minutes: the tests, then the benchmarks. Installs nothing.
#   bash benchmarks/gpu.sh [FOLDER]          # JSON and logs; benchmarks/results if none is given
#   bash benchmarks/gpu.sh --dry FOLDER      # the same with toy shapes on a CPU, under Triton's interpreter
# PYTHON: the interpreter, python3 if none is given; it needs torch, and pytest for the tests. BUDGET, TEST_SECONDS:
# seconds of everything, and of the tests. Exit status 1: a test or a row failed or was skipped, or there is no pytest.
set -uo pipefail

dry=
[[ ${1:-} == --dry ]] && { dry=--dry; shift; }
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
out=$(realpath -m "${1:-$root/benchmarks/results}")
if [[ -n $dry && $out/ == "$root"/benchmarks/results/* ]]; then
    echo "a dry run is no measurement: give it a folder other than benchmarks/results" >&2
    exit 2
fi
python=${PYTHON:-python3}
[[ $python == */* ]] && python=$(realpath -s "$python")
cd "$root"
mkdir -p "$out"
budget=${BUDGET:-540} test_seconds=${TEST_SECONDS:-170} status=0
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
if [[ -n $dry ]]; then
    export TRITON_INTERPRET=1 CUDA_VISIBLE_DEVICES= OMP_NUM_THREADS=1
fi

if "$python" -c "import pytest" 2>/dev/null; then
    timeout -k 5 $((test_seconds + 20)) "$python" benchmarks/gpu_tests.py "$out/gpu_tests" --seconds "$test_seconds" \
        $dry 2>&1 | tee "$out/gpu_tests.txt" || status=1
else
    echo "pytest is not installed: NO TEST WAS RUN"
    status=1
fi
echo "tests done after $SECONDS s"

for preset in gpu-large gpu-decode gpu-hf gpu-dense gpu-paper; do
    left=$((budget - SECONDS))
    [[ $preset == gpu-hf && $left -gt 85 ]] && left=85 # its rows take milliseconds each
    # the last 25 s are for the row that runs by then; out of time, a preset still writes which rows are left
    timeout -k 5 $((left > 20 ? left : 20)) "$python" benchmarks/bench_gpu.py "$preset" --out "$out" $dry \
        --budget $((left > 25 ? left - 25 : 0)) 2>&1 | tee "$out/$preset.txt" || status=1
done
echo "all done after $SECONDS s, exit status $status"
exit $status
