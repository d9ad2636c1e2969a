"""The language models on a CPU: gpt-tiny and txl-tiny beside their MoE twins, and upcycling, with figures and JSON.

    python benchmarks/language_models.py --data wikitext2.test.txt --valid wikitext2.valid.txt

Every run is `fastmoe train --recipe NAME` in a process of its own with one thread, two at a time: a dense model and its
twin side by side, so that whatever else the machine does slows both. Runs that are finished are not run again. Writes
docs/images/language_models/*.png and benchmarks/results/language_models.json.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

from language_models_upcycle import upcycling

from fastmoe.bench.machine import machine
from fastmoe.train.compare import compare, read_side
from fastmoe.train.compare_plot import plot_sides

HERE = Path(__file__).parent
IMAGES = HERE.parent / "docs" / "images" / "language_models"
RESULTS = HERE / "results" / "language_models.json"
PAIRS = {"gpt": ("gpt-tiny", "gpt-tiny-moe"), "txl": ("txl-tiny", "txl-tiny-moe")}


def folder(out: Path, recipe: str, seed: int) -> Path:
    return out / f"{recipe}-seed{seed}"


def command(recipe: str, seed: int, given: argparse.Namespace) -> list[str]:
    files = ["--data", str(given.data), "--valid", str(given.valid), "--out", str(folder(given.out, recipe, seed))]
    rest = ["--seed", str(seed), "--device", "cpu", "--sample-bytes", "0", "--no-tensorboard", "--resume"]
    return [sys.executable, "-m", "fastmoe", "train", "--recipe", recipe, *files, *rest]


def train_twins(pair: Iterable[str], seed: int, given: argparse.Namespace) -> None:
    """Those that are not finished, side by side."""
    todo = [recipe for recipe in pair if not (folder(given.out, recipe, seed) / "results.json").is_file()]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    started = [subprocess.Popen(command(recipe, seed, given), env=environment) for recipe in todo]
    if any([process.wait() for process in started]):  # noqa: C419 - all are waited for
        sys.exit(f"training failed: {', '.join(todo)}, seed {seed}")


def twins(name: str, given: argparse.Namespace) -> dict:
    """Train, draw and measure one pair."""
    for seed in range(1, given.seeds + 1):
        train_twins(PAIRS[name], seed, given)
    sides = [read_side(str(folder(given.out, recipe, 0)).replace("seed0", "seed*"), recipe) for recipe in PAIRS[name]]
    details = sides[0].runs[0].details
    plot_sides(sides, IMAGES / f"{name}.png", f"{details['corpus']['name']}; {details['machine']['cpu']}, 1 thread")
    found = compare(*sides)
    for side in found["sides"].values():
        side["runs"] = [Path(path).name for path in side["runs"]]
        config = side["details"]["config"]
        config["data"] |= {key: Path(config["data"][key]).name for key in ("path", "valid")}
        config["run"]["out"] = None
    return found


def commit() -> str:
    asked = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
    return subprocess.run(asked, cwd=HERE, capture_output=True, text=True).stdout.strip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="text to learn")
    parser.add_argument("--valid", type=Path, required=True, help="text to validate on")
    parser.add_argument("--out", type=Path, default=Path("runs/language_models"), help="folder of all runs")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only", nargs="+", choices=[*PAIRS, "upcycling"], default=[*PAIRS, "upcycling"])
    given = parser.parse_args()
    IMAGES.mkdir(parents=True, exist_ok=True)
    written = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
    written |= {"machine": machine(), "commit": commit(), "threads": 1, "seeds": given.seeds}
    for name in given.only:
        if name == "upcycling":
            dense = [folder(given.out, "gpt-tiny", seed) for seed in range(1, given.seeds + 1)]
            written[name] = upcycling(dense, given.out, IMAGES / "upcycling.png")
        else:
            written[name] = twins(name, given)
        RESULTS.write_text(json.dumps(written, indent=1) + "\n")


if __name__ == "__main__":
    main()
