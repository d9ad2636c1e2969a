"""A few steps of training, alone or as one of several processes, and what is to be remembered of them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from fastmoe._processes import Processes
from fastmoe.check.probe import Settings
from fastmoe.check.problem import Problem
from fastmoe.parallel.clip import clip_grad_norm_
from fastmoe.parallel.global_state import Piece, model_state, staged
from fastmoe.parallel.global_state_placement import placed

STEPS = 3
LEARNING_RATE = 1e-3
OUTPUTS, LOSS, NORM, GRADIENTS, WEIGHTS = (
    "outputs",
    "loss",
    "gradient norm",
    "gradients",
    f"weights after {STEPS} steps",
)
QUANTITIES = (OUTPUTS, LOSS, NORM, GRADIENTS, WEIGHTS)


@dataclass(frozen=True)
class Record:
    """What this process holds of each quantity, by quantity and name; copies, in the memory of the CPU."""

    pieces: dict[tuple[str, str], Piece] = field(default_factory=dict)

    def add(self, quantity: str, pieces: Iterable[Piece]) -> None:
        for piece in pieces:
            self.pieces[quantity, piece.name] = replace(piece, local=staged(piece))


def train(problem: Problem, shares: Processes, settings: Settings) -> Record:
    """Train on this process's share of the batch: equal shares, by rank.

    Args:
        problem: on its device; the model is parallel where there are other processes.
        shares: the processes among which the batch is divided.
        settings: the same on every process.

    Returns:
        Outputs, loss and gradient norm of each step; gradients of the first, before clipping; weights and persistent
        buffers after the last.
    """
    model, record, each = problem.model, Record(), problem.rows // shares.size
    batch = tuple(t[shares.rank * each : (shares.rank + 1) * each] for t in problem.batch)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, eps=settings.eps)
    for step in range(1, STEPS + 1):
        optimizer.zero_grad()
        output = model(batch[0])
        loss = problem.loss_of(output, batch)
        loss.backward()
        if step == 1:
            record.add(GRADIENTS, gradients(model))
        norm = clip_grad_norm_(model, settings.max_norm)
        optimizer.step()
        record.add(OUTPUTS, outputs(output, f"step {step}", shares))
        record.add(LOSS, [number(f"step {step}", shares.sum(loss.detach()) / shares.size)])
        record.add(NORM, [number(f"step {step}", norm)])
    record.add(WEIGHTS, model_state(model).pieces.values())
    return record


def gradients(model: nn.Module) -> Iterator[Piece]:
    """Each where its parameter is; zeros where there is none."""
    state = model_state(model)
    for parameter in model.parameters():
        if parameter.requires_grad:
            piece, grad = state.of[parameter], parameter.grad
            yield replace(piece, local=torch.zeros_like(piece.local) if grad is None else placed(piece.name, grad)[0])


def outputs(output: object, name: str, shares: Processes) -> Iterator[Piece]:
    """Every tensor in what the model returned that has rows."""
    for i, leaf in enumerate(tree_leaves(output)):
        if isinstance(leaf, Tensor) and leaf.dim():
            length = len(leaf)
            shape, offset = (
                (length * shares.size, *leaf.shape[1:]),
                (length * shares.rank, *(0 for _ in leaf.shape[1:])),
            )
            yield Piece(f"{name}, tensor {i + 1}" if i else name, leaf.detach(), shape, offset)


def number(name: str, value: Tensor) -> Piece:
    return Piece(name, value, (), ())
