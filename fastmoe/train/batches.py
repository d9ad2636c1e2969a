"""Which bytes a step sees: a pure function of (seed, step, micro-step, rank).

Nothing is remembered between steps, so a resumed run and a dense and an MoE twin see the same data in the same order,
and the batch of a step is the same however many processes or micro-steps share it.
"""

from __future__ import annotations

from dataclasses import dataclass

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

    def of(self, rows_B: Tensor) -> Tensor:
        parts = self.micro_steps * self.world_size
        if rows_B.shape[0] % parts:
            raise ValueError(
                f"batch_size must be a multiple of grad_accumulation * processes = "
                f"{self.micro_steps} * {self.world_size}; got {rows_B.shape[0]}"
            )
        return rows_B.chunk(parts)[self.micro_step * self.world_size + self.rank]


WHOLE = Share()


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
