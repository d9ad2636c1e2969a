"""All tests for a GPU, dealt out to processes that share it: `python benchmarks/gpu_tests.py FOLDER --seconds 170`.

They are those marked `gpu`, and those of the `triton` backend, which run on a GPU where there is one. Compiling kernels
takes most of the time, and one core a process. FOLDER/tests-NUMBER.txt are the logs. `--dry`: those that run on a CPU.
"""

import argparse
import os
import re
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
OPTIONS = ["-o", "addopts=", "-p", "no:cacheprovider", "--rootdir", str(ROOT)]
MARK = re.compile(r"mark\.gpu|import .*on_gpu")  # other files may need packages that are not there


class Collected:
    """The tests that pytest finds, by name."""

    def __init__(self) -> None:
        self.names: list[str] = []

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        self.names += [item.nodeid for item in session.items]


def collect(dry: bool) -> list[str]:
    found = Collected()
    if dry:
        selections = [("not slow and not gpu", [ROOT / "tests/gpu"])]
    else:
        triton = sorted((ROOT / "tests/kernels").glob("test_triton_*.py"))
        triton = [path for path in triton if path.name != "test_triton_compile.py"]  # for GPUs that are not there
        marked = [path for path in (ROOT / "tests").rglob("test_*.py") if MARK.search(path.read_text())]
        selections = [("gpu", sorted(marked)), ("not slow and not gpu", triton)]
    for marker, paths in selections:
        code = pytest.main([*OPTIONS, "-qq", "--collect-only", "--no-summary", "-m", marker, *map(str, paths)], [found])
        if code != pytest.ExitCode.OK:
            raise SystemExit(f"the tests cannot be collected: {code!r}")
    return list(dict.fromkeys(found.names))


RUN = """
import signal, sys, pytest
signal.signal(signal.SIGINT, signal.default_int_handler)
sys.exit(pytest.main([*sys.argv[2:], *open(sys.argv[1]).read().splitlines()]))
"""


def start(names: list[str], log: Path) -> subprocess.Popen:
    """One process; names go by a file, for they are many."""
    listed = log.with_suffix(".names")
    listed.write_text("\n".join(names) + "\n")
    command = [sys.executable, "-c", RUN, str(listed), *OPTIONS, "-v", "-ra", "--tb=short"]
    return subprocess.Popen(command, stdout=log.open("w"), stderr=subprocess.STDOUT, cwd=ROOT, start_new_session=True)


def finish(processes: list[subprocess.Popen], end: float) -> list[int]:
    """Exit statuses; out of time, pytest is interrupted, which makes it report, and then ended with all it started."""
    for patience, stop in ((end, signal.SIGINT), (end + 10, signal.SIGKILL)):
        for process in processes:
            with suppress(subprocess.TimeoutExpired):
                process.wait(max(0, patience - time.monotonic()))
        for process in processes:
            if process.poll() is None:
                os.killpg(process.pid, stop)
    return [process.wait() for process in processes]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--seconds", type=float, default=170)
    parser.add_argument("--processes", type=int, default=min(16, len(os.sched_getaffinity(0))))
    parser.add_argument("--dry", action="store_true")
    arguments = parser.parse_args()
    if not arguments.dry and not torch.cuda.is_available():
        raise SystemExit("there is no GPU: every test would be skipped")
    end = time.monotonic() + arguments.seconds
    arguments.out.mkdir(parents=True, exist_ok=True)
    names = collect(arguments.dry)
    hands = [hand for i in range(arguments.processes) if (hand := names[i :: arguments.processes])]
    logs = [arguments.out / f"tests-{i}.txt" for i in range(len(hands))]
    processes = [start(hand, log) for hand, log in zip(hands, logs, strict=True)]
    codes = finish(processes, end)
    for log, code in zip(logs, codes, strict=True):
        lines = log.read_text().splitlines()
        print(f"{log.name}: exit status {code}: {lines[-1] if lines else 'nothing was printed'}")
        for line in lines:
            if line.startswith(("FAILED", "ERROR", "SKIPPED")):
                print(f"    {line}")
    return int(any(codes))


if __name__ == "__main__":
    sys.exit(main())
