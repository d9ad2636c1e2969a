"""The same training on one process, which is what layouts are compared with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from fastmoe._processes import ALONE
from fastmoe.check.compare import Entry, entries
from fastmoe.check.probe import Settings, probe
from fastmoe.check.problem import Problem
from fastmoe.check.training import Record, train
from fastmoe.model import set_stats_group

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class Reference(NamedTuple):
    """What the first process found; `record` stays there, the others are told the rest."""

    record: Record
    known: list[Entry]
    settings: Settings


def refer(
    make: Callable[[], Problem],
    batch: tuple[Tensor, ...],
    device: torch.device,
    group: ProcessGroup,
    shares: int,
    tolerance: float,
) -> Reference:
    """Train on the whole batch twice, with other random numbers.

    Args:
        make: builds the model anew.
        batch: all of it.
        device: of model and batch.
        group: of this process alone.
        shares: into how many the layout divides the batch.
        tolerance: for the mean of the shares' losses.

    Raises:
        ValueError: the model has no gradient, or its loss is no mean.
    """

    def alone() -> Problem:
        problem = replace(make(), batch=batch).on(device)
        set_stats_group(problem.model, group)
        return problem

    settings = probe(alone(), shares, tolerance)
    records = []
    for _ in range(2):
        problem = alone()
        torch.seed()
        records.append(train(problem, ALONE, settings))
    return Reference(records[0], entries(*records), settings)
