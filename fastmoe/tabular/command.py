"""The command line of the recipes on tables: `python -m fastmoe.tabular.command mmoe-census --data FILE`."""

from __future__ import annotations

import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tyro
from rich.console import Console
from rich.table import Table

from fastmoe._errors import unknown_name
from fastmoe.tabular.correlation import run_synthetic
from fastmoe.tabular.fit import FitOptions
from fastmoe.tabular.plots import LABELS
from fastmoe.tabular.recipes import run_census
from fastmoe.tabular.synthetic import SyntheticOptions


@dataclass(frozen=True)
class CensusCommand:
    """MMoE, a shared bottom and single tasks, of equal size, on Census-Income: income above 50K, never married."""

    data: tuple[Path, ...]
    """One file of the set, split 60/20/20; or census-income.data and census-income.test, of which the second is halved
    into validation and test rows. As they are or compressed by gzip."""
    out: Path = Path("runs/mmoe-census")
    """Folder of census.json, census_auc.png and census_gates.png."""
    seeds: int = 5
    """How many seeds: each model is trained once for each seed and learning rate."""
    models: tuple[str, ...] = ("mmoe", "shared_bottom", "single_task")
    """Of mmoe, omoe, shared_bottom, single_task."""
    lrs: tuple[float, ...] = (2.5e-4, 5e-4, 1e-3, 2e-3)
    """Learning rates, of which each model takes the best on the validation rows."""
    exclude: tuple[str, ...] = ()
    """Columns that are no features, besides education, marital_status, instance_weight and income. Of the others,
    household_and_family, household_summary and tax_filer_status tell of most rows whether they never married."""
    d_expert: int = 8
    """Width of each of the 8 experts; the widths of the other models follow."""
    split_seed: int = 0
    fit: FitOptions = field(default_factory=FitOptions)

    def run(self, show: Any) -> Table:
        result = run_census(
            self.data,
            range(self.seeds),
            self.out,
            models=self.models,
            lrs=self.lrs,
            exclude=self.exclude,
            d_expert=self.d_expert,
            options=self.fit,
            split_seed=self.split_seed,
            show=show,
        )
        return census_table(result)


@dataclass(frozen=True)
class SyntheticCommand:
    """MMoE, OMoE and a shared bottom, of equal size, on two made-up tasks of a known correlation."""

    out: Path = Path("runs/mmoe-synthetic")
    """Folder of synthetic.json and synthetic.png."""
    correlations: tuple[float, ...] = (0.5, 0.9, 1.0)
    seeds: int = 5
    """How many problems are drawn for each correlation."""
    models: tuple[str, ...] = ("mmoe", "omoe", "shared_bottom")
    """Of mmoe, omoe, shared_bottom, single_task."""
    lrs: tuple[float, ...] = (1e-3, 1e-2)
    """Learning rates, of which each model takes the best for each correlation."""
    problem: SyntheticOptions = field(default_factory=SyntheticOptions)

    def run(self, show: Any) -> Table:
        options = {"models": self.models, "lrs": self.lrs, "options": self.problem, "show": show}
        return synthetic_table(run_synthetic(self.correlations, range(self.seeds), self.out, **options))


RECIPES: dict[str, type[CensusCommand] | type[SyntheticCommand]] = {
    "mmoe-census": CensusCommand,
    "mmoe-synthetic": SyntheticCommand,
}


def main(arguments: Sequence[str]) -> int:
    """Run a recipe, named first, then its options; 0: done; 2: it cannot be run as asked."""
    name, *rest = arguments or ["--help"]
    console = Console(highlight=False)
    if name in ("-h", "--help"):
        console.print(f"usage: fastmoe train --recipe NAME [options]; NAME is one of {', '.join(RECIPES)}")
        return 0
    try:
        if name not in RECIPES:
            raise unknown_name("recipe", name, RECIPES)
        command = tyro.cli(
            RECIPES[name], prog=f"fastmoe train --recipe {name}", args=rest, config=(tyro.conf.OmitArgPrefixes,)
        )
        table = command.run(console.print)
    except ValueError as error:
        print(f"fastmoe train --recipe {name}: {error}", file=sys.stderr)
        return 2
    console.print(table)
    console.print(f"wrote {command.out}")
    return 0


def census_table(result: dict[str, Any]) -> Table:
    table = Table(title=f"test AUC, mean and standard deviation over {len(result['seeds'])} seeds")
    for column in ("model", "parameters", "lr", *result["tasks"]):
        table.add_column(column)
    for model, row in result["models"].items():
        pairs = zip(row["test_auc_mean"], row["test_auc_std"], strict=True)
        cells = [f"{mean:.4f}" + ("" if std is None else f" ± {std:.4f}") for mean, std in pairs]
        table.add_row(LABELS[model], f"{row['parameters']:,}", f"{row['lr']:g}", *cells)
    return table


def synthetic_table(result: dict[str, Any]) -> Table:
    last, seeds = result["steps"][-1], len(result["seeds"])
    table = Table(title=f"held-out loss after {last} steps, mean and standard deviation over {seeds} seeds")
    for column in ("model", "parameters", *(f"correlation {c}" for c in result["correlations"])):
        table.add_column(column)
    for model, parameters in result["parameters"].items():
        cells = []
        for rows in result["correlations"].values():
            losses = [by_step[-1] for by_step in rows[model]["losses"]]
            spread = f" ± {statistics.stdev(losses):.4f}" if len(losses) > 1 else ""
            cells.append(f"{statistics.fmean(losses):.4f}{spread}")
        table.add_row(LABELS[model], f"{parameters:,}", *cells)
    return table


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
