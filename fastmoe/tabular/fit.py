"""Trains one network for several binary tasks, with early stopping by validation."""

from __future__ import annotations

import math
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

EVAL_ROWS = 4096


@dataclass(frozen=True)
class FitOptions:
    batch_size: int = 512
    max_epochs: int = 60
    patience: int = 4
    """Stop after so many epochs without a higher AUC on the validation rows."""
    max_steps: int | None = None
    """Stop after so many steps, whatever the epoch."""

    def __post_init__(self) -> None:
        for name in ("batch_size", "max_epochs", "patience"):
            check_int(name, getattr(self, name), 1)
        if self.max_steps is not None:
            check_int("max_steps", self.max_steps, 1)


@dataclass
class Best:
    """The epoch with the highest mean validation AUC of `tasks`, and the test AUCs of that epoch."""

    tasks: list[int]
    epoch: int = 0
    valid: float = -math.inf
    valid_auc: tuple[float, ...] = ()
    test_auc: tuple[float, ...] = ()


@dataclass(frozen=True)
class Fit:
    """AUCs are by task, at the epoch that validation chose; `utilization` is `(K, E)` of an MMoE, else None."""

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
    """
    check_number("lr", lr)
    start = time.perf_counter()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(mix(seed, "weights"))
        model = MultiTask(config, sharing)
    tasks = list(range(config.num_tasks))
    groups = [Best([task]) for task in tasks] if sharing == "single_task" else [Best(tasks)]
    optimizer = torch.optim.Adam(model.parameters(), lr=lr, fused=True)
    batches = epochs_of(data.train, seed, options)
    epoch = 0
    for epoch, epoch_batches in enumerate(batches, start=1):
        for x_TD, y_TK in epoch_batches:
            optimizer.zero_grad()
            task_losses(model(x_TD), y_TK).sum().backward()
            optimizer.step()
        note(groups, epoch, model, data)
        if all(epoch - best.epoch >= options.patience for best in groups):
            break
    return Fit(
        valid_auc=[auc_k for best in groups for auc_k in best.valid_auc],
        test_auc=[auc_k for best in groups for auc_k in best.test_auc],
        best_epochs=[best.epoch for best in groups],
        epochs=epoch,
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        seconds=time.perf_counter() - start,
        utilization=utilization(model, data.test),
    )


def task_losses(logits_TK: Tensor, y_TK: Tensor) -> Tensor:
    """Each task's mean cross entropy `(K,)`."""
    return F.binary_cross_entropy_with_logits(logits_TK, y_TK, reduction="none").mean(0)


def epochs_of(rows: Rows, seed: int, options: FitOptions) -> Iterator[Iterator[tuple[Tensor, Tensor]]]:
    """For each epoch its batches, in an order of their own; what is left over at the end is a smaller batch."""
    generator = torch.Generator().manual_seed(mix(seed, "order"))
    per_epoch = math.ceil(len(rows) / options.batch_size)
    left = options.max_epochs * per_epoch if options.max_steps is None else options.max_steps
    for _ in range(options.max_epochs):
        if left <= 0:
            return
        chunks = torch.randperm(len(rows), generator=generator).split(options.batch_size)[:left]
        left -= len(chunks)
        yield ((rows.x_TD[index], rows.y_TK[index]) for index in chunks)


@torch.no_grad()
def predict(model: MultiTask, rows: Rows) -> Tensor:
    return torch.cat([model(x_TD) for x_TD in rows.x_TD.split(EVAL_ROWS)])


def note(groups: list[Best], epoch: int, model: MultiTask, data: Census) -> None:
    """Take this epoch down for each group of tasks to which it is the best so far."""
    valid_TK = predict(model, data.valid)
    for best in groups:
        valid = tuple(auc(valid_TK[:, task], data.valid.y_TK[:, task]) for task in best.tasks)
        if sum(valid) / len(valid) > best.valid:
            test_TK = predict(model, data.test)
            best.epoch, best.valid, best.valid_auc = epoch, sum(valid) / len(valid), valid
            best.test_auc = tuple(auc(test_TK[:, task], data.test.y_TK[:, task]) for task in best.tasks)


@torch.no_grad()
def utilization(model: MultiTask, rows: Rows) -> list[list[float]] | None:
    """Mean gate weight by task and expert over the rows, after the last step."""
    if not isinstance(model.bottom, MMoE):
        return None
    total_KE = torch.zeros(model.config.num_tasks, model.config.num_experts)
    for x_TD in rows.x_TD.split(EVAL_ROWS):
        model(x_TD)
        assert model.bottom.last_stats is not None
        total_KE += model.bottom.last_stats.utilization[0] * len(x_TD)
    return (total_KE / len(rows)).tolist()
