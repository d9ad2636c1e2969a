"""Exact evaluation of a language model on a whole text."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from fastmoe.models.common import language_model_step


def evaluate_bits_per_byte(model: nn.Module, text_N: Tensor, **arguments: Any) -> float:
    """`evaluate_nats` of a model of bytes, in bits."""
    return evaluate_nats(model, text_N, **arguments) / math.log(2)


@torch.no_grad()
def evaluate_nats(
    model: nn.Module, text_N: Tensor, *, segment: int = 128, streams: int = 1, device: Any = None, **options: Any
) -> float:
    """The mean cross entropy of a text, in nats per token; its exponential is the perplexity.

    Each of the N - 1 tokens after the first is predicted once. What came before reaches a prediction through the
    model's state, from segment to segment; a model without one sees its segment alone.

    Args:
        model: any model of this package.
        text_N: its tokens, of any whole dtype, also on another device or a memory map.
        segment: tokens at once. A Transformer-XL is as exact and faster with a longer one.
        streams: the text is cut in so many parts, read side by side: faster, and each but the first starts without
            context.
        device: of the model; that of its first parameter if None.
        options: of the model's forward; for a Transformer-XL `memory_length=3800, same_length=True` evaluate with a
            longer memory than in training (section 4.1), to the same number whatever the segment is.
    """
    count = len(text_N) - 1
    if count < streams or segment < 1 or streams < 1:
        raise ValueError(
            f"expected segment and streams of at least 1, and more tokens than streams; "
            f"got segment={segment}, streams={streams} and {count + 1} tokens"
        )
    device = next(model.parameters()).device if device is None else device
    was_training = model.training
    model.eval()
    try:
        total, state = _read(model, _rows(text_N[: count // streams * streams + 1], streams, device), segment, options)
        rest_N = text_N[count // streams * streams :]
        if len(rest_N) > 1:  # what does not divide follows the last stream
            last = None if state is None else state[:, -1:]
            total += _read(model, _rows(rest_N, 1, device), segment, options, last)[0]
    finally:
        model.train(was_training)
    return float(total) / count


def _rows(text_N: Tensor, streams: int, device: Any) -> tuple[Tensor, Tensor]:
    """Tokens and targets, (streams, length)."""
    tokens_N = text_N.to(device, torch.int64)
    return tokens_N[:-1].view(streams, -1), tokens_N[1:].view(streams, -1)


def _read(
    model: nn.Module, rows: tuple[Tensor, Tensor], segment: int, options: dict[str, Any], state: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """The sum of all losses in float64, and the state at the end."""
    total = torch.zeros((), dtype=torch.float64, device=rows[0].device)
    for tokens_BS, targets_BS in zip(rows[0].split(segment, 1), rows[1].split(segment, 1), strict=True):
        loss, state = language_model_step(model, tokens_BS, targets_BS, state, **options)
        total += loss.double() * tokens_BS.numel()
    return total, state
