"""What a layer may ask of the other processes: sums and gathered rows, nothing else."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class CollectiveError(RuntimeError):
    """A collective operation failed: another process died, hangs, or took another way."""


@contextmanager
def collective(place: str = "") -> Iterator[None]:
    """Around a collective operation: what goes wrong there becomes a `CollectiveError`, which names the place."""
    try:
        yield
    except CollectiveError:
        raise
    except RuntimeError as error:
        where = f"{place}: " if place else ""
        raise CollectiveError(f"{where}an exchange with the other processes failed: {error}") from error


@dataclass(frozen=True)
class Processes:
    """The processes that share a batch; `group` is None where there is only this one.

    Their batch is the rows of rank 0, then those of rank 1, and so on. `place`: for errors, who asks.
    """

    group: "dist.ProcessGroup | None" = None
    rank: int = 0
    size: int = 1
    place: str = ""

    @classmethod
    def of(cls, group: "dist.ProcessGroup | None" = None) -> "Processes":
        """Those of `group`; of None all, if `torch.distributed` is set up, as with PyTorch's own modules."""
        if not dist.is_available() or not dist.is_initialized():
            return ALONE
        size = dist.get_world_size(group)
        return ALONE if size == 1 else cls(group or dist.group.WORLD, dist.get_rank(group), size)

    def __deepcopy__(self, memo: dict[int, Any]) -> "Processes":
        """Itself: process groups cannot be copied."""
        return self

    def sum(self, x: Tensor) -> Tensor:
        """`x` summed over all processes, without gradient."""
        if self.group is None:
            return x
        x = x.detach().clone()
        with collective(self.place):
            dist.all_reduce(x, group=self.group)
        return x

    def sum_for_loss(self, x: Tensor) -> Tensor:
        """`x` summed over all processes, for a loss that every process then computes alike.

        The gradient is scaled by the number of processes, so that the mean of all processes' gradients, as DDP and
        FSDP take it, is the gradient of that loss. Backward needs no communication.
        """
        return x if self.group is None else self.sum_for_all(ScaleGradient.apply(x, self.size))

    def sum_for_all(self, x: Tensor) -> Tensor:
        """`x` summed over all processes, each of which computes the same with it: the gradient passes."""
        return x if self.group is None else _SumForAll.apply(x, self)

    def copy(self, x: Tensor) -> Tensor:
        """`x`, alike in all processes, each of which computes a part of what becomes of it: gradients are summed."""
        return x if self.group is None else _Copy.apply(x, self)

    def gather(self, x: Tensor) -> Tensor:
        """Every process's `x`, which must have one shape everywhere, stacked by rank: `(size, *shape)`; no gradient."""
        if self.group is None:
            return x.detach().unsqueeze(0)
        parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(self.size)]
        with collective(self.place):
            dist.all_gather(parts, x.detach().contiguous(), group=self.group)
        return torch.stack(parts)

    def before(self, x: Tensor) -> Tensor:
        """`x` summed over the processes of lower rank, without gradient."""
        return self.gather(x)[: self.rank].sum(0, dtype=x.dtype)

    def gather_rows(self, x: Tensor) -> tuple[Tensor, slice]:
        """The rows of the whole batch, without gradient, and which of them are this process's.

        Processes may have different numbers of rows; to learn them waits for the device.
        """
        if self.group is None:
            return x.detach(), slice(0, len(x))
        lengths = self.gather(torch.tensor(len(x), device=x.device)).tolist()
        start = sum(lengths[: self.rank])
        return self.join_rows(x, lengths), slice(start, start + len(x))

    def join_rows(self, x: Tensor, lengths: Sequence[int]) -> Tensor:
        """The rows of all processes, of which each is known to have so many, by rank; no gradient."""
        padded = x.new_zeros(max(lengths), *x.shape[1:])
        padded[: len(x)] = x.detach()
        return torch.cat([part[:length] for part, length in zip(self.gather(padded), lengths, strict=True)])


ALONE = Processes()


class _SumForAll(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, processes: Processes) -> Tensor:
        return processes.sum(x)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
        pass

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[no-untyped-def]
        return grad, None


class _Copy(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, processes: Processes) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
        ctx.processes = inputs[1]

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[no-untyped-def]
        return ctx.processes.sum(grad), None


class ScaleGradient(torch.autograd.Function):
    """The identity; the gradient is multiplied by a number."""

    @staticmethod
    def forward(x: Tensor, factor: float) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
        ctx.factor = inputs[1]

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[no-untyped-def]
        return grad * ctx.factor, None
