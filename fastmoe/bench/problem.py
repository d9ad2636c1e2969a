"""What every contender is given, and what it must offer."""

import dataclasses
from collections.abc import Callable
from functools import cached_property

import torch
from torch import Tensor

from fastmoe import kernels
from fastmoe.bench.truth import truth


@dataclasses.dataclass
class Problem:
    """One shape (T, E, D, H, K): tokens, routing and weights that every contender shares."""

    shape: tuple[int, int, int, int, int]
    dtype: torch.dtype
    activation: str = "gelu"
    device: str = "cpu"
    backward: bool = True

    def __post_init__(self) -> None:
        T, E, D, H, K = self.shape
        torch.manual_seed(0)
        weights_TK, self.ids_TK = torch.randn(T, E, device=self.device).softmax(1).topk(K)
        self.weights_TK = (weights_TK / weights_TK.sum(1, keepdim=True)).requires_grad_()
        self.x_TD = self._randn(T, D).requires_grad_()
        self.w1 = self._randn(E, H * (1 + self.gated), D).div_(D**0.5).requires_grad_()
        self.w2 = self._randn(E, D, H).div_(H**0.5).requires_grad_()
        self.grad_TD = self._randn(T, D)
        self.token_N = torch.arange(T, device=self.device).repeat_interleave(K)

    def _randn(self, *shape: int) -> Tensor:
        return torch.randn(shape, device=self.device, dtype=self.dtype)

    @property
    def gated(self) -> bool:
        return kernels.get_activation(self.activation).gated

    @property
    def leaves(self) -> list[Tensor]:
        """x, routing weights, w1, w2: the tensors whose gradients are compared."""
        return [self.x_TD, self.weights_TK, self.w1, self.w2]

    @property
    def expert_bytes(self) -> int:
        """Bytes of the weights of all experts that have a row."""
        touched = len(self.ids_TK.unique())
        return touched * (self.w1[0].numel() + self.w2[0].numel()) * self.w1.element_size()

    def grads(self) -> list[Tensor]:
        found = [leaf.grad for leaf in self.leaves]
        return [torch.zeros_like(t) if g is None else g for t, g in zip(self.leaves, found, strict=True)]

    @property
    def flops(self) -> int:
        """Floating-point operations of forward's two products; backward's take twice as many."""
        return 2 * self.ids_TK.numel() * (self.w1[0].numel() + self.w2[0].numel())

    @cached_property
    def truth(self) -> list[Tensor]:
        """The right output, and gradients if there is a backward."""
        return truth(self)

    def routed_mlp(self, backend: str, x_TD: Tensor, weights_TK: Tensor, w1: Tensor, w2: Tensor) -> Tensor:
        _, E, _, _, K = self.shape
        plan = kernels.plan(self.ids_TK.reshape(-1), E, backend=backend)
        weights_N = weights_TK.reshape(-1)
        return kernels.expert_mlp(
            x_TD, self.token_N, weights_N, plan, w1, None, w2, None,
            activation=self.activation, rows_per_token=K, backend=backend,
        )  # fmt: skip


@dataclasses.dataclass
class Contender:
    """`forward()` gives the output; `leaves` are the tensors that backward fills.

    `grads()` are the gradients of x, routing weights, w1 and w2, for the comparison; None where the mathematics is
    another, and only finiteness is checked. `replayed`: a CUDA graph, which needs no work of the host.
    """

    forward: Callable[[], Tensor]
    leaves: list[Tensor]
    upstream: Tensor
    grads: Callable[[], list[Tensor]] | None
    replayed: bool = False

    def step(self) -> None:
        self.clear()
        self.forward().backward(self.upstream)

    def clear(self) -> None:
        for leaf in self.leaves:
            leaf.grad = None


class RefusedError(Exception):
    """A contender cannot take a problem; the message says why."""
