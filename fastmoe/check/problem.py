"""What is trained: a model, a batch and a loss, as a factory of the user's gives them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fastmoe.parallel.engines import find_parallel

Loss = Callable[..., Tensor]
Answer = tuple[nn.Module, Tensor | tuple[Tensor, ...], Loss]
Factory = Callable[[], Answer]


@dataclass(frozen=True)
class Problem:
    """The model is called with the first tensor of the batch; the loss with what it returns, and the whole batch."""

    model: nn.Module
    batch: tuple[Tensor, ...]
    loss: Loss

    @property
    def rows(self) -> int:
        return len(self.batch[0])

    def on(self, device: torch.device) -> Problem:
        return Problem(self.model.to(device), tuple(t.to(device) for t in self.batch), self.loss)

    def loss_of(self, output: object, batch: tuple[Tensor, ...]) -> Tensor:
        """The loss of one process.

        Raises:
            ValueError: it is not one number.
        """
        loss = self.loss(output, *batch)
        if not isinstance(loss, Tensor) or loss.dim():
            got = f"a tensor {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
            raise ValueError(f"the loss must be a tensor of no dimension, got {got}")
        return loss


def build(factory: Factory, seed: int, dtype: torch.dtype) -> Problem:
    """Call the factory.

    Raises:
        ValueError: it answers something else than (model, batch, loss).
    """
    torch.manual_seed(seed)
    answer = factory()
    if not isinstance(answer, tuple) or len(answer) != 3:
        raise ValueError(f"the factory must return (model, batch, loss), got {type(answer).__name__}")
    model, given, loss = answer
    if not isinstance(model, nn.Module) or not callable(loss):
        got = f"({type(model).__name__}, ..., {type(loss).__name__})"
        raise ValueError(f"the factory must return (model, batch, loss): a module, tensors and a callable; got {got}")
    if find_parallel(model) is not None:
        raise ValueError("the factory must return a model that is not parallel: leave fastmoe.parallelize to the check")
    batch = tuple(t.to(dtype) if t.is_floating_point() else t for t in _tensors(given))
    return Problem(model.to(dtype).train(), batch, loss)


def _tensors(given: object) -> tuple[Tensor, ...]:
    batch = (given,) if isinstance(given, Tensor) else given
    if not isinstance(batch, tuple | list) or not batch or not all(isinstance(t, Tensor) for t in batch):
        raise ValueError(f"the factory's batch must be a tensor or a tuple of tensors, got {type(given).__name__}")
    shapes = [tuple(t.shape) for t in batch]
    if () in shapes or len({shape[0] for shape in shapes}) > 1:
        raise ValueError(f"all tensors of the batch must have its rows as first dimension, got shapes {shapes}")
    return tuple(batch)
