"""What the benchmarks of several processes look at: bytes and time in exchanges, a step without its link."""

import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor

from fastmoe.dispatch.exchange import Exchange


@dataclass
class Traffic:
    """Of this process.

    Attributes:
        seconds: spent in starting exchanges and in waiting for them, forward and backward.
        sent: the bytes that leave this process in each exchange, in order.
    """

    seconds: float = 0.0
    sent: list[int] = field(default_factory=list)


@contextmanager
def traffic() -> Iterator[Traffic]:
    """Watches every exchange inside the context."""
    found, launch, wait = Traffic(), Exchange.launch, Exchange.wait

    def counted(self: Exchange, remote: Tensor, *args) -> Tensor:  # type: ignore[no-untyped-def]
        found.sent.append(remote.nbytes)
        return timed(launch, self, remote, *args)

    def timed(method, *args):  # type: ignore[no-untyped-def]
        start = time.perf_counter()
        try:
            return method(*args)
        finally:
            found.seconds += time.perf_counter() - start

    def waited(self: Exchange, what: str) -> None:
        timed(wait, self, what)

    with mock.patch.object(Exchange, "launch", counted), mock.patch.object(Exchange, "wait", waited):
        yield found


@contextmanager
def no_link() -> Iterator[None]:
    """Rows do not travel: zeros are there at once, as many as would come. How many does travel, a few bytes."""
    launch = Exchange.launch

    def at_once(self: Exchange, remote: Tensor, sent_P: list[int], received_P: list[int], what: str) -> Tensor:
        if not remote.is_floating_point():
            return launch(self, remote, sent_P, received_P, what)
        self.work = mock.Mock()
        rank = self.processes.rank
        return remote.new_zeros(sum(received_P) - received_P[rank], *remote.shape[1:])

    with mock.patch.object(Exchange, "launch", at_once):
        yield


def quartiles(values: Sequence[float]) -> dict[str, float]:
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return {"q1": low, "median": middle, "q3": high}


def gather(values: Sequence[float]) -> Tensor:
    """Every process's values, one row each."""
    mine = torch.tensor(values, dtype=torch.float64)
    rows = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(rows, mine)
    return torch.stack(rows)
