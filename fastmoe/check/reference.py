"""The same training on one process, which is what layouts are compared with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

import torch

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
    parallel: Problem,
    device: torch.device,
    group: ProcessGroup,
    shares: int,
    rounding: float,
) -> Reference:
    """Train on the whole batch twice, with other random numbers.

    Args:
        make: builds the model anew.
        parallel: what is compared with it; has the batch.
        device: of model and batch.
        group: of this process alone.
        shares: into how many the layout divides the batch.
        rounding: by which the mean of the shares' losses may differ from that of the whole batch.

    Raises:
        ValueError: the model is not new, has no gradient, or its loss is no mean.
    """

    def alone() -> Problem:
        problem = replace(make(), batch=parallel.batch).on(device)
        if set(problem.model.parameters()) & set(parallel.model.parameters()):
            raise ValueError("the factory must build the model anew whenever it is called, with parameters of its own")
        set_stats_group(problem.model, group)
        return problem

    def run() -> Record:
        problem = alone()
        torch.seed()
        return train(problem, ALONE, settings)

    settings = probe(alone(), shares, rounding)
    record, again = run(), run()
    return Reference(record, entries(record, again), settings)
