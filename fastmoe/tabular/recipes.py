"""The experiment on Census-Income, from data to JSON and figures."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from fastmoe.models.mmoe import MultiTaskConfig
from fastmoe.tabular.features import Census, load_census
from fastmoe.tabular.fit import Fit, FitOptions, fit
from fastmoe.tabular.grid import Show, check_folder, check_grid, write
from fastmoe.tabular.plots import LABELS, plot_aucs, plot_gates


def run_census(
    data: Sequence[Path],
    seeds: Sequence[int] = range(5),
    out: Path = Path("runs/mmoe-census"),
    *,
    models: Sequence[str] = ("mmoe", "shared_bottom", "single_task"),
    lrs: Sequence[float] = (2.5e-4, 5e-4, 1e-3, 2e-3),
    exclude: Sequence[str] = (),
    d_expert: int = 8,
    options: FitOptions | None = None,
    split_seed: int = 0,
    show: Show = print,
) -> dict[str, Any]:
    """The paper's census experiment (section 6.3, group 1): income above 50K, and never married.

    Each model is trained once for each of `seeds` with each of `lrs`, all on the same split, and reported at the
    learning rate with the highest validation AUC, mean over tasks and seeds.

    Writes `census.json`, `census_auc.png` and, with an MMoE among the models, `census_gates.png` into `out`, and
    returns what is in the JSON.

    Args:
        data, split_seed, exclude: as for `load_census`.

    Raises:
        ValueError: data, models, seeds or options that cannot be used, or training that diverges.
    """
    check_grid(models, seeds, lrs)
    census = load_census(data, split_seed, exclude)
    check_folder(out)
    config = MultiTaskConfig(len(census.features), len(census.tasks), d_expert=d_expert)
    rows = {name: len(getattr(census, name)) for name in ("train", "valid", "test")}
    show(f"census: {rows}, {len(census.features)} features")
    results = {m: census_model(census, config, m, seeds, lrs, options or FitOptions(), show) for m in models}
    result = {
        "recipe": "mmoe-census",
        "tasks": census.tasks,
        "data": {
            "files": census.files,
            "rows": rows,
            "features": len(census.features),
            "split_seed": split_seed,
            "exclude": list(exclude),
        },
        "config": asdict(config),
        "options": asdict(options or FitOptions()) | {"lrs": list(lrs)},
        "seeds": list(seeds),
        "models": results,
    }
    write(result, out / "census.json")
    plot_aucs({model: row["test_auc"] for model, row in results.items()}, census.tasks, out / "census_auc.png")
    (out / "census_gates.png").unlink(missing_ok=True)  # of an earlier run, which may have had an MMoE
    if "mmoe" in results:
        gates = {f"seed {s}": g for s, g in zip(seeds, results["mmoe"]["utilization"], strict=True)}
        plot_gates(gates, census.tasks, out / "census_gates.png")
    return result


def census_model(
    census: Census,
    config: MultiTaskConfig,
    sharing: str,
    seeds: Sequence[int],
    lrs: Sequence[float],
    options: FitOptions,
    show: Show,
) -> dict[str, Any]:
    """Train on every seed with every learning rate; what the JSON has of this model: all, and the best rate's AUCs."""
    fits: dict[float, list[Fit]] = {lr: [] for lr in lrs}
    for lr in lrs:
        for seed in seeds:
            fits[lr].append(fit(census, config, sharing, seed, lr, options))
            show(f"{LABELS[sharing]}, lr {lr:g}, seed {seed}: {describe(fits[lr][-1])}")
    rates = {f"{lr:g}": summary(of_lr) for lr, of_lr in fits.items()}
    best = max(lrs, key=lambda lr: rates[f"{lr:g}"]["valid_auc_mean"])
    gates = [done.utilization for done in fits[best]] if sharing == "mmoe" else None
    return {
        "parameters": fits[best][0].parameters,
        "lr": best,
        "utilization": gates,
        **rates[f"{best:g}"],
        "lrs": rates,
    }


def summary(fits: Sequence[Fit]) -> dict[str, Any]:
    """AUCs over seeds: the mean over tasks on the validation rows; mean and deviation by task on the test rows."""
    by_task = list(zip(*(done.test_auc for done in fits), strict=True))
    return {
        "valid_auc_mean": statistics.fmean(value for done in fits for value in done.valid_auc),
        "test_auc_mean": [statistics.fmean(values) for values in by_task],
        "test_auc_std": [statistics.stdev(values) if len(values) > 1 else None for values in by_task],
        "test_auc": [done.test_auc for done in fits],
        "valid_auc": [done.valid_auc for done in fits],
        "best_epochs": [done.best_epochs for done in fits],
        "seconds": [round(done.seconds, 1) for done in fits],
    }


def describe(done: Fit) -> str:
    aucs = ", ".join(f"{value:.4f}" for value in done.test_auc)
    return f"test AUC {aucs} (epoch {done.best_epochs} of {done.epochs}, {done.seconds:.0f} s)"
