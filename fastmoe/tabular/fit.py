"""Trains one network for several binary tasks, with early stopping by validation."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from fastmoe._errors import check_int, check_number
from fastmoe._seeds import mix
from fastmoe.mmoe import MMoE
from fastmoe.models.mmoe import MultiTask, MultiTaskConfig
from fastmoe.tabular.auc import auc
from fastmoe.tabular.features import Census, Rows


@dataclass(frozen=True)
class FitOptions:
    batch_size: int = 512
    max_epochs: int = 100
    patience: int = 4
    """Stop after so many epochs without a higher AUC on the validation rows."""
    max_steps: int | None = None
    """Stop after so many steps, whatever the epoch."""

    def __post_init__(self) -> None:
        for name in ("batch_size", "max_epochs", "patience"):
            check_int(name, getattr(self, name), 1)
        if self.max_steps is not None:
            check_int("max_steps", self.max_steps, 1)


@dataclass(frozen=True)
class Epoch:
    """What a network reaches after an epoch: by task its AUCs, and what stopping goes by; an MMoE's mean gate weights
    `(K, E)` over the test rows."""

    number: int
    criterion: list[float]
    valid_auc: list[float]
    test_auc: list[float]
    utilization: list[list[float]] | None


@dataclass(frozen=True)
class Fit:
    """AUCs by task, each at the epoch that validation chose for it; `utilization` is `(K, E)` of an MMoE at that epoch,
    else None."""

    valid_auc: list[float]
    test_auc: list[float]
    best_epochs: list[int]
    epochs: int
    parameters: int
    seconds: float
    utilization: list[list[float]] | None


def fit(data: Census, config: MultiTaskConfig, sharing: str, seed: int, lr: float, options: FitOptions) -> Fit:
    """Train a `MultiTask` on the sum of the tasks' cross entropies, by Adam at a constant learning rate.

    What tasks share, they stop together, by their mean AUC; the parts of `single_task` share nothing, and each stops by
    its own. `seed` sets the weights and the order of the rows, the same for every `sharing`.

    Raises:
        ValueError: a learning rate that is no number, or at which training diverges.
    """
    check_number("lr", lr)
    start = time.perf_counter()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(mix(seed, "weights"))
        model = MultiTask(config, sharing)
    optimizer = torch.optim.Adam(model.parameters(), lr=lr, fused=True)
    best_K: list[Epoch] = []
    for number, batches in enumerate(batches_of_epochs(len(data.train), seed, options), start=1):
        train_epoch(model, optimizer, data.train, batches)
        epoch = evaluate(model, data, number)
        if epoch is None:
            raise ValueError(f"{sharing} diverged in epoch {number} at lr {lr:g} with seed {seed}: give lower lrs")
        best_K = best_by_task(best_K, epoch)
        if all(number - best.number >= options.patience for best in best_K):
            break
    return Fit(
        valid_auc=[best.valid_auc[task] for task, best in enumerate(best_K)],
        test_auc=[best.test_auc[task] for task, best in enumerate(best_K)],
        best_epochs=[best.number for best in best_K],
        epochs=number,
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        seconds=time.perf_counter() - start,
        utilization=best_K[0].utilization,
    )


def batches_of_epochs(rows: int, seed: int, options: FitOptions) -> Iterator[list[Tensor]]:
    """For each epoch the row numbers of its batches, in an order of its own; what is left over at the end is a smaller
    batch."""
    generator = torch.Generator().manual_seed(mix(seed, "order"))
    for epoch in range(options.max_epochs):
        batches = list(torch.randperm(rows, generator=generator).split(options.batch_size))
        left = len(batches) if options.max_steps is None else options.max_steps - epoch * len(batches)
        if left <= 0:
            return
        yield batches[:left]


def train_epoch(model: MultiTask, optimizer: torch.optim.Optimizer, rows: Rows, batches: list[Tensor]) -> None:
    for index_B in batches:
        optimizer.zero_grad()
        task_losses(model(rows.x_TD[index_B]), rows.y_TK[index_B]).sum().backward()
        optimizer.step()


def task_losses(logits_TK: Tensor, y_TK: Tensor) -> Tensor:
    """Each task's mean cross entropy `(K,)`."""
    return F.binary_cross_entropy_with_logits(logits_TK, y_TK, reduction="none").mean(0)


@torch.no_grad()
def evaluate(model: MultiTask, data: Census, number: int) -> Epoch | None:
    """None if the outputs are not all finite."""
    valid_TK, test_TK = model(data.valid.x_TD), model(data.test.x_TD)
    if not (valid_TK.isfinite().all() and test_TK.isfinite().all()):
        return None
    valid_auc, test_auc = aucs(valid_TK, data.valid.y_TK), aucs(test_TK, data.test.y_TK)
    gates_KE = None
    if isinstance(model.bottom, MMoE) and model.bottom.last_stats is not None:
        gates_KE = model.bottom.last_stats.utilization[0].tolist()  # of the last pass: the test rows
    alone = model.sharing == "single_task"
    criterion = valid_auc if alone else [statistics.fmean(valid_auc)] * len(valid_auc)
    return Epoch(number, criterion, valid_auc, test_auc, gates_KE)


def aucs(logits_TK: Tensor, y_TK: Tensor) -> list[float]:
    return [auc(logit_T, label_T) for logit_T, label_T in zip(logits_TK.unbind(1), y_TK.unbind(1), strict=True)]


def best_by_task(best_K: list[Epoch], epoch: Epoch) -> list[Epoch]:
    """Of two epochs that are as good, the earlier."""
    if not best_K:
        return [epoch] * len(epoch.criterion)
    return [max(best, epoch, key=lambda one: one.criterion[task]) for task, best in enumerate(best_K)]
