"""What a model with memory learns: consecutive segments of parallel streams.

B streams begin at even distances in the data and go around it for ever; where they begin is turned by the seed. Stream
b's segment of step t follows that of step t - 1, so that memory carries over; it is a pure function of (seed, step).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from fastmoe._seeds import mix
from fastmoe.train.batches import WHOLE, Batch, Share, check_length, windows

EVAL_STREAMS = 32
"""So many at most are evaluated side by side, whatever the batch of training is: the loss depends on it a little."""


@dataclass(frozen=True)
class Streams:
    """Segments of `block_size` bytes of `batch_size` streams, over all processes and micro-steps."""

    block_size: int
    batch_size: int
    eval_sequences: int
    seed: int

    def draw(self, data: Tensor, step: int, share: Share = WHOLE) -> tuple[Tensor, Tensor]:
        """Tokens and the bytes after them, both int64 (B, S)."""
        check_length(data, self.block_size, "training")
        size = data.numel()
        first = mix(self.seed, -2) % size + step * self.block_size
        starts_B = share.of(first + torch.arange(self.batch_size) * size // self.batch_size)
        rows_BS1 = data[(starts_B[:, None] + torch.arange(self.block_size + 1)) % size].long()
        return rows_BS1[:, :-1], rows_BS1[:, 1:]

    def held_out(self, data: Tensor, share: Share = WHOLE) -> Iterator[Batch]:
        """Streams from even distances, each read once from its beginning without memory; `eval_sequences` segments of
        `block_size` in all.

        With `eval_sequences` 0, or more than there are, all of the data: each byte but the first counts once. Bytes
        that do not divide among the streams come last, without memory. A process without a stream takes the first one,
        which does not count there.
        """
        check_length(data, self.block_size, "held-out")
        room = data.numel() - 1
        wanted = min(self.eval_sequences * self.block_size or room, room)
        streams = min(EVAL_STREAMS, wanted // self.block_size)
        apart, length = room // streams, wanted // streams
        rows = torch.arange(streams)[share.rank :: share.world_size]
        starts_B = (rows if len(rows) else torch.zeros(1, dtype=torch.int64)) * apart
        for begin in range(0, length, self.block_size):
            size = min(self.block_size, length - begin)
            yield Batch(*windows(data, starts_B + begin, size), counted=len(rows), fresh=begin == 0)
        rest = room - apart * streams
        if wanted == room and rest:
            start_1 = torch.tensor([room - rest])
            yield Batch(*windows(data, start_1, rest), counted=int(share.is_first), fresh=True)
