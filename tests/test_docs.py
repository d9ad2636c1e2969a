"""Every Python block of the README and the docs runs as it stands."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def blocks_of(page: Path) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), re.S | re.M)


BLOCKS = [
    pytest.param(block, id=f"{path.name}-{i}")
    for path in (
        ROOT / "README.md",
        ROOT / "docs" / "benchmarks.md",
        ROOT / "docs" / "concepts.md",
        ROOT / "docs" / "huggingface.md",
        ROOT / "docs" / "migrating-from-fastmoe.md",
        ROOT / "docs" / "models.md",
        ROOT / "docs" / "monitor.md",
        ROOT / "docs" / "routers.md",
    )
    for i, block in enumerate(blocks_of(path))
]


TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
PARALLEL = re.findall(
    r"^```python\n(.*?)^```", (ROOT / "docs" / "parallel.md").read_text(encoding="utf-8"), re.S | re.M
)


@pytest.mark.parametrize("number", range(len(PARALLEL)))
def test_block_runs_on_two_processes(number: int, tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text(PARALLEL[number], encoding="utf-8")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    for _ in range(3):
        ran = subprocess.run(
            [*TORCHRUN, "train.py"], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120
        )
        if "terminate called without an active exception" not in ran.stderr:  # gloo (torch 2.13) may abort at exit
            break
    assert ran.returncode == 0, ran.stderr


def test_there_are_blocks() -> None:
    assert len(BLOCKS) >= 5


@pytest.mark.parametrize("block", BLOCKS)
def test_block_runs(block: str) -> None:
    exec(compile(block, "block", "exec"), {"__name__": "block"})


def test_links_lead_somewhere() -> None:
    for page in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")):
        for link in re.findall(r"\]\((?!https?://|#)([^)#]+)", page.read_text(encoding="utf-8")):
            assert (page.parent / link).exists(), f"{page.name} links to {link}"
