"""The language models on a CPU: gpt-tiny and txl-tiny beside their MoE twins, and upcycling, with figures and JSON.

    python benchmarks/language_models.py --data wikitext2.test.txt --valid wikitext2.valid.txt

Every run is `fastmoe train --recipe NAME` in a process of its own with one thread, two at a time: a dense model and its
twin side by side, so that whatever else the machine does slows both. Runs that are finished are not run again, if they
are of these data and of the recipe as it is. Writes docs/images/language_models/*.png and
benchmarks/results/language_models.json, where each section says on which machine and from how many seeds it is.
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
from fastmoe.train.compare import compare, side_of
from fastmoe.train.compare_plot import plot_sides
from fastmoe.train.compare_runs import read_run
from fastmoe.train.corpus import load_corpus
from fastmoe.train.options import to_plain
from fastmoe.train.recipes import recipe as recipe_of

HERE = Path(__file__).parent
IMAGES = HERE.parent / "docs" / "images" / "language_models"
RESULTS = HERE / "results" / "language_models.json"
PAIRS = {"gpt": ("gpt-tiny", "gpt-tiny-moe"), "txl": ("txl-tiny", "txl-tiny-moe")}
FILES = ("path", "valid")
RECIPES = {**PAIRS, "upcycling": ("gpt-tiny",)}
"""Which runs a section of the JSON is made of; upcycling trains further ones itself."""


def folder(out: Path, recipe: str, seed: int) -> Path:
    return out / f"{recipe}-seed{seed}"


def folders(recipe: str, given: argparse.Namespace) -> list[Path]:
    return [folder(given.out, recipe, seed) for seed in range(1, given.seeds + 1)]


def is_finished(run: Path) -> bool:
    return (run / "results.json").is_file()


def command(recipe: str, seed: int, given: argparse.Namespace) -> list[str]:
    files = ["--data", str(given.data), "--valid", str(given.valid), "--out", str(folder(given.out, recipe, seed))]
    rest = ["--seed", str(seed), "--device", "cpu", "--sample-bytes", "0", "--no-tensorboard", "--resume"]
    return [sys.executable, "-m", "fastmoe", "train", "--recipe", recipe, *files, *rest]


def check_finished(recipe: str, given: argparse.Namespace) -> None:
    """Raises ValueError: a finished run is of other data than is asked for, or of the recipe as it was once."""
    planned, data = to_plain(recipe_of(recipe)), load_corpus(given.data, given.valid).sha256
    for path in filter(is_finished, folders(recipe, given)):
        run = read_run(path)
        if run.details["corpus"]["sha256"] != data:
            raise ValueError(
                f"{path} was trained on other data than {given.data} and {given.valid}: give another --out"
            )
        changed = [
            name for name in ("model", "moe", "optim", "data") if nameless(run.config[name]) != nameless(planned[name])
        ]
        if changed:
            raise ValueError(f"recipe {recipe} had another {', '.join(changed)} for {path}: give another --out")


def nameless(section: dict) -> dict:
    """Of the data it says how they are evaluated, and not which files they are."""
    return {key: value for key, value in section.items() if key not in FILES}


def train_twins(pair: Iterable[str], seed: int, given: argparse.Namespace) -> None:
    """Those that are not finished, side by side."""
    todo = [recipe for recipe in pair if not is_finished(folder(given.out, recipe, seed))]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    started = [subprocess.Popen(command(recipe, seed, given), env=environment) for recipe in todo]
    if any([process.wait() for process in started]):  # noqa: C419 - all are waited for
        sys.exit(f"training failed: {', '.join(todo)}, seed {seed}")


def twins(name: str, given: argparse.Namespace) -> dict:
    """Train, draw and measure one pair."""
    for seed in range(1, given.seeds + 1):
        train_twins(PAIRS[name], seed, given)
    sides = [side_of(folders(recipe, given), recipe) for recipe in PAIRS[name]]
    details = sides[0].runs[0].details
    plot_sides(sides, IMAGES / f"{name}.png", f"{details['corpus']['name']}; {details['machine']['cpu']}, 1 thread")
    return compare(*sides)


def measure(name: str, given: argparse.Namespace) -> dict:
    """A section of the JSON, without the names of this machine's folders."""
    if name == "upcycling":
        found = upcycling(folders("gpt-tiny", given), given.out, IMAGES / "upcycling.png")
    else:
        found = twins(name, given)
    for side in found["sides"].values():
        for run in side["runs"]:
            run["path"] = Path(run["path"]).name
        config = side["details"]["config"]
        config["data"] |= {key: Path(config["data"][key]).name for key in FILES}
        config["run"]["out"] = None
    return found


def commit() -> str:
    asked = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
    return subprocess.run(asked, cwd=HERE, capture_output=True, text=True).stdout.strip()


def write(given: argparse.Namespace) -> None:
    """Every section, or those of --only into the file as it is."""
    sections = [name for name in RECIPES if name in (given.only or RECIPES)]
    if given.seeds < 1:
        raise ValueError(f"--seeds must be at least 1; got {given.seeds}")
    for recipe in sorted({recipe for name in sections for recipe in RECIPES[name]}):
        check_finished(recipe, given)
    IMAGES.mkdir(parents=True, exist_ok=True)
    # before the pictures change the checkout
    where = {"machine": machine(), "commit": commit(), "threads": 1, "seeds": given.seeds}
    written = json.loads(RESULTS.read_text()) if given.only and RESULTS.is_file() else {}
    for name in sections:
        written[name] = where | measure(name, given)
        RESULTS.write_text(json.dumps(written, indent=1, allow_nan=False) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="text to learn")
    parser.add_argument("--valid", type=Path, required=True, help="text to validate on")
    parser.add_argument("--out", type=Path, default=Path("runs/language_models"), help="folder of all runs")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only", nargs="+", choices=RECIPES, help="measure these, and leave the others as they are")
    try:
        write(parser.parse_args())
    except ValueError as error:
        sys.exit(f"language_models.py: {error}")


if __name__ == "__main__":
    main()
