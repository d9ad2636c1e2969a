"""One all-to-all under autograd, in two halves, so that something else can be computed while rows travel."""

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fastmoe._processes import CollectiveError, Processes


@dataclass
class Exchange:
    """Rows to every process of a group and from every one; those for this process itself do not travel.

    Attributes:
        processes: P of them.
        sent_P: how many rows go to each process.
        received_P: how many come from each.
        place: words for an error: which layer, in which pass.
    """

    processes: Processes
    sent_P: list[int]
    received_P: list[int]
    place: str
    work: Any = field(default=None, repr=False)
    waiting: Tensor | None = field(default=None, repr=False)  # what is being sent must live until it is
    gradient: Tensor | None = field(default=None, repr=False)  # what comes in backward

    def start(self, rows: Tensor, after: Tensor | None = None) -> "Flight":
        """Send rows, which stand by the process that they go to. The gradient travels the other way.

        `after`: the ticket of the exchange that brought what the rows were made of, see `Flight.finish`.
        """
        rank, sent_P = self.processes.rank, self.sent_P
        before = sum(sent_P[:rank])
        low, own, high = rows.split([before, sent_P[rank], len(rows) - before - sent_P[rank]])
        remote = torch.cat([low, high]) if len(low) and len(high) else (low if len(low) else high)
        if after is None:
            after = torch.empty(0, device=rows.device, requires_grad=True)
        return Flight(self, own, _Start.apply(remote, after, self))

    def send(self, rows: Tensor) -> Tensor:
        """`start` and `finish` in one."""
        return self.start(rows).finish()[0]

    def launch(self, remote: Tensor, sent_P: list[int], received_P: list[int], what: str) -> Tensor:
        """Start the collective; the answer is filled once `wait` returns."""
        rank = self.processes.rank
        sent_P, received_P = ([*p[:rank], 0, *p[rank + 1 :]] for p in (sent_P, received_P))
        out = remote.new_empty(sum(received_P), *remote.shape[1:])
        self.waiting = remote.contiguous()
        try:
            self.work = dist.all_to_all_single(
                out, self.waiting, received_P, sent_P, group=self.processes.group, async_op=True
            )
        except RuntimeError as error:
            raise self.failure(what, error) from error
        return out

    def wait(self, what: str) -> None:
        try:
            self.work.wait()
        except RuntimeError as error:
            raise self.failure(what, error) from error
        self.work = self.waiting = None

    def failure(self, what: str, error: RuntimeError) -> CollectiveError:
        return CollectiveError(
            f"{self.place}: {what} with the {self.processes.size - 1} other processes that hold its experts failed, "
            f"on process {self.processes.rank} of {self.processes.size}: {error}"
        )


@dataclass(frozen=True)
class Flight:
    """Rows on their way: `own` do not travel, `coming` are there after `finish`."""

    exchange: Exchange
    own: Tensor
    coming: Tensor

    def finish(self) -> tuple[Tensor, Tensor]:
        """Wait for the rows: by the process that they came from, this one's own among them; and a ticket.

        The ticket is an empty tensor. Handed to the exchange that takes results back, it makes backward pass through
        both on every process, also where the results do not depend on the rows: elsewhere they may.
        """
        coming, ticket = _Wait.apply(self.coming, self.exchange)
        before = sum(self.exchange.received_P[: self.exchange.processes.rank])
        low, high = coming.split([before, len(coming) - before])
        return torch.cat([low, self.own, high]), ticket


class _Start(torch.autograd.Function):
    """Starts the exchange; in backward waits for the gradients that `_Wait` sent off."""

    @staticmethod
    def forward(ctx, remote: Tensor, after: Tensor, exchange: Exchange) -> Tensor:  # type: ignore[no-untyped-def]
        ctx.exchange, ctx.after_dtype = exchange, after.dtype
        return exchange.launch(remote, exchange.sent_P, exchange.received_P, "sending rows")

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor):  # type: ignore[no-untyped-def]
        exchange = ctx.exchange
        exchange.wait("receiving gradients")
        gradient, exchange.gradient = exchange.gradient, None
        return gradient, grad.new_empty(0, dtype=ctx.after_dtype), None


class _Wait(torch.autograd.Function):
    """Waits for the exchange; in backward sends the gradients off."""

    @staticmethod
    def forward(ctx, coming: Tensor, exchange: Exchange) -> tuple[Tensor, Tensor]:  # type: ignore[no-untyped-def]
        ctx.exchange = exchange
        exchange.wait("receiving rows")
        return coming.view_as(coming), coming.new_empty(0)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor, _ticket: Tensor):  # type: ignore[no-untyped-def]
        exchange = ctx.exchange
        exchange.gradient = exchange.launch(grad, exchange.received_P, exchange.sent_P, "sending gradients")
        return grad, None  # only its shape counts: `_Start` hands on what comes
