"""The script that a GPU waits for runs from end to end."""

import json
import os
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "txl_gpu.py"


def test_a_rehearsal_on_a_cpu(tmp_path):
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_bytes(bytes(range(32, 127)) * 60)
    files = ["--data", str(tmp_path / "a.txt"), "--valid", str(tmp_path / "b.txt")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(SCRIPT.parents[1])}
    command = [sys.executable, str(SCRIPT), *files, "--dry", "--seconds", "0.5", "--out", str(tmp_path / "out")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "out" / "txl_gpu.json").read_text())
    assert list(result["runs"]) == ["txl-tiny", "txl-tiny-moe"]
    for run in result["runs"].values():
        assert run["step_ms"] > 0
        assert 0 < run["curve"][-1]["bits_per_byte"] < 8
    assert (tmp_path / "out" / "txl_gpu.png").read_bytes().startswith(b"\x89PNG")
