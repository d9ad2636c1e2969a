"""Processes that hold the same input share the work: each routes a slice, and all get the whole output."""

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from fastmoe._processes import Processes


@dataclass(frozen=True)
class Slices:
    """FastMoE's `slice_group`, for hosts with tensor parallelism (He et al. 2021, 2103.13262).

    Slices are of the input's first dimension. Within its slice each process takes part as if it had a batch of its
    own: gradients there are scaled so that the mean over the processes is what one of them would have alone.

    Attributes:
        processes: those that hold the same input.
    """

    processes: Processes

    def bounds(self, length: int) -> list[int]:
        """Where the slices begin and end, one number more than there are processes."""
        size = self.processes.size
        return [length * i // size for i in range(size + 1)]

    def take(self, x: Tensor) -> Tensor:
        """This process's slice of `x`, which is alike in all; the gradient is that of the whole."""
        return _Take.apply(x, self) if x.is_floating_point() else x[self.mine(len(x))]

    def mine(self, length: int) -> slice:
        bounds, rank = self.bounds(length), self.processes.rank
        return slice(bounds[rank], bounds[rank + 1])

    def gather(self, part: Tensor, length: int) -> Tensor:
        """All slices' results, in order."""
        return _Gather.apply(part, self, length)

    def whole(self, part: Tensor, length: int) -> Tensor:
        """As `gather`, without gradient."""
        return self.processes.join_rows(part, [end - start for start, end in pairwise(self.bounds(length))])


class _Take(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, slices: Slices) -> Tensor:  # type: ignore[no-untyped-def]
        ctx.slices, ctx.length = slices, len(x)
        return x[slices.mine(len(x))].clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor):  # type: ignore[no-untyped-def]
        return ctx.slices.whole(grad, ctx.length) / ctx.slices.processes.size, None


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, part: Tensor, slices: Slices, length: int) -> Tensor:  # type: ignore[no-untyped-def]
        ctx.slices = slices
        return slices.whole(part, length)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor):  # type: ignore[no-untyped-def]
        return grad[ctx.slices.mine(len(grad))] * ctx.slices.processes.size, None, None
