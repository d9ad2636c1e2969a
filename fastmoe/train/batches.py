"""Which bytes a step sees: a pure function of (seed, step, micro-step, rank).

`Windows` are for a model without memory, `Streams` (in `streams.py`) for one with it. Nothing is remembered between
steps, so a resumed run and a dense and an MoE twin see the same data in the same order, and the batch of a step is the
same however many processes or micro-steps share it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from fastmoe._seeds import mix


@dataclass(frozen=True)
class Share:
    """One part of a step's batch: this micro-step's, on this process."""

    micro_step: int = 0
    micro_steps: int = 1
    rank: int = 0
    world_size: int = 1

    @property
    def is_first(self) -> bool:
        return self.micro_step == self.rank == 0

    def of(self, rows_B: Tensor) -> Tensor:
        parts = self.micro_steps * self.world_size
        if rows_B.shape[0] % parts:
            raise ValueError(
                f"batch_size must be a multiple of grad_accumulation * processes = "
                f"{self.micro_steps} * {self.world_size}; got {rows_B.shape[0]}"
            )
        return rows_B.chunk(parts)[self.micro_step * self.world_size + self.rank]


WHOLE = Share()


@dataclass(frozen=True)
class Batch:
    """Held-out text, int64 (B, S) each."""

    tokens_BS: Tensor
    targets_BS: Tensor
    counted: int
    """So many of its rows count; of the others another process has them."""
    fresh: bool = True
    """It does not go on where the one before it ended."""


class Batches(Protocol):
    """What a trainer asks for; every process gets equally many batches."""

    def draw(self, data: Tensor, step: int, share: Share = WHOLE) -> tuple[Tensor, Tensor]:
        """This share of a step's tokens and of the bytes after them."""

    def held_out(self, data: Tensor, share: Share = WHOLE) -> Iterator[Batch]:
        """This share of the held-out text, the same each time."""


@dataclass(frozen=True)
class Windows:
    """Random windows of `block_size` bytes, `batch_size` a step; held out, at most `eval_sequences` (0: all)."""

    block_size: int
    batch_size: int
    eval_sequences: int
    seed: int

    def draw(self, data: Tensor, step: int, share: Share = WHOLE) -> tuple[Tensor, Tensor]:
        return draw_batch(data, self.block_size, self.batch_size, seed=self.seed, step=step, share=share)

    def held_out(self, data: Tensor, share: Share = WHOLE) -> Iterator[Batch]:
        """One without a window in the last batch takes the batch's first, which does not count there."""
        tokens_BS, targets_BS = held_out(data, self.block_size, self.eval_sequences or data.numel())
        for rows in torch.arange(len(tokens_BS)).split(self.batch_size * share.world_size):
            mine = rows[share.rank :: share.world_size]
            taken = mine if len(mine) else rows[:1]
            yield Batch(tokens_BS[taken], targets_BS[taken], counted=len(mine))


def windows(data: Tensor, starts_B: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    """Tokens and the bytes after them, both int64 (B, S)."""
    rows_BS1 = data[starts_B[:, None] + torch.arange(block_size + 1)].long()
    return rows_BS1[:, :-1], rows_BS1[:, 1:]


def draw_batch(
    data: Tensor, block_size: int, batch_size: int, *, seed: int, step: int, share: Share = WHOLE
) -> tuple[Tensor, Tensor]:
    """This share of the step's `batch_size` random windows."""
    check_length(data, block_size, "training")
    generator = torch.Generator().manual_seed(mix(seed, step))
    starts_B = torch.randint(data.numel() - block_size, (batch_size,), generator=generator)
    return windows(data, share.of(starts_B), block_size)


def held_out(data: Tensor, block_size: int, sequences: int) -> tuple[Tensor, Tensor]:
    """At most `sequences` windows that do not overlap, spread evenly over `data`."""
    check_length(data, block_size, "held-out")
    room = (data.numel() - 1) // block_size
    starts_B = torch.arange(min(sequences, room)) * room // min(sequences, room) * block_size
    return windows(data, starts_B, block_size)


def check_length(data: Tensor, block_size: int, part: str) -> None:
    if data.numel() <= block_size:
        raise ValueError(
            f"the {part} part of the data has {data.numel()} bytes; block_size={block_size} needs {block_size + 1}"
        )
