"""MMoE on Census-Income and on synthetic tasks: the results and figures of docs/results.md.

    python benchmarks/mmoe.py census --data census-income.test.gz   # or the archive's .data and .test files
    python benchmarks/mmoe.py synthetic

One thread is enough: OMP_NUM_THREADS=1. census runs twice, each in a process of its own: with the paper's features, and
without the columns that tell of most rows whether they never married. Writes benchmarks/results/mmoe_*.json and
docs/images/mmoe_*.png, and prints the tables in Markdown.
"""

import argparse
import importlib.metadata
import json
import shutil
import statistics
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

from fastmoe.bench.machine import machine
from fastmoe.tabular.correlation import run_synthetic
from fastmoe.tabular.plots import LABELS
from fastmoe.tabular.recipes import run_census

HERE = Path(__file__).parent
IMAGES = HERE.parent / "docs" / "images"
# Ma et al., KDD 2018, table 1 (section 6.3, group 1), of MMoE: mean of 400 runs, and the run best on income.
# Trained there on census-income.data, 199,523 rows; census-income.test, 99,762 rows, was halved to validate and test.
PUBLISHED = {"income above 50K": {"mean": 0.9359, "best": 0.9410}, "never married": {"mean": 0.9927, "best": 0.9926}}

VARIANTS = {
    "as in the paper": (),
    "without household and tax filer": ("household_and_family", "household_summary", "tax_filer_status"),
}
"""Columns of census that are no features, besides those that never are."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", choices=["census", "synthetic"])
    parser.add_argument("--data", type=Path, nargs="+", default=[], help="census: one file or two")
    parser.add_argument("--seeds", type=int, default=5)
    args = parser.parse_args()
    where = machine() | {"polars": importlib.metadata.version("polars")}  # before the pictures change the checkout
    start = time.perf_counter()
    if args.recipe == "census":
        with ProcessPoolExecutor(len(VARIANTS)) as pool:
            results = pool.map(partial(census, args.data, args.seeds), VARIANTS)
            result = {"published": PUBLISHED, "variants": dict(zip(VARIANTS, results, strict=True))}
        print_census(result["variants"])
    else:
        with tempfile.TemporaryDirectory() as folder:
            result = run_synthetic(seeds=range(args.seeds), out=Path(folder))
            keep_pictures(Path(folder))
        print_synthetic(result)
    result = {"machine": where, "seconds": round(time.perf_counter() - start), **result}
    path = HERE / "results" / f"mmoe_{args.recipe}.json"
    path.write_text(json.dumps(rounded(result), indent=1) + "\n", encoding="utf-8")


def census(data: list[Path], seeds: int, variant: str) -> dict:
    """Keeps the pictures of the paper's variant alone."""
    with tempfile.TemporaryDirectory() as folder:
        show = partial(print, f"{variant}:", flush=True)
        result = run_census(data, range(seeds), Path(folder), exclude=VARIANTS[variant], show=show)
        if variant == "as in the paper":
            keep_pictures(Path(folder))
    return result


def keep_pictures(folder: Path) -> None:
    for picture in folder.glob("*.png"):
        shutil.copy(picture, IMAGES / f"mmoe_{picture.name}")


def rounded(value):
    """Floats to 6 digits, so that the file stays small."""
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(item) for item in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value


def print_census(variants: dict) -> None:
    for variant, result in variants.items():
        print(f"\n{variant}, {result['data']['features']} features\n")
        print("| model | parameters | lr |", *(f"{task} |" for task in result["tasks"]))
        print("|---" * (3 + len(result["tasks"])) + "|")
        for model, row in result["models"].items():
            pairs = zip(row["test_auc_mean"], row["test_auc_std"], strict=True)
            aucs = " | ".join(f"{mean:.5f} ± {std:.5f}" for mean, std in pairs)
            print(f"| {LABELS[model]} | {row['parameters']:,} | {row['lr']:g} | {aucs} |")
    for which in ("mean", "best"):
        print(f"| published, MMoE, {which} of 400 | | |", *(f"{value[which]:.4f} |" for value in PUBLISHED.values()))


def print_synthetic(result: dict) -> None:
    """Mean, standard deviation and least over seeds of the loss after the last step."""
    print("| model | parameters |", *(f"correlation {correlation} |" for correlation in result["correlations"]))
    print("|---" * (2 + len(result["correlations"])) + "|")
    for model, parameters in result["parameters"].items():
        cells = []
        for models in result["correlations"].values():
            last = [losses[-1] for losses in models[model]["losses"]]
            cells.append(f"{statistics.fmean(last):.4f} ± {statistics.stdev(last):.4f} (least {min(last):.4f})")
        print(f"| {LABELS[model]} | {parameters:,} |", " | ".join(cells), "|")


if __name__ == "__main__":
    main()
