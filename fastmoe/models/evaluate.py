"""Exact evaluation of a language model on a whole text."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

import fastmoe
from fastmoe._errors import check_int
from fastmoe.models.checks import described
from fastmoe.models.common import evaluation_mode, language_model_step


def evaluate_bits_per_byte(model: nn.Module, text_N: Any, **arguments: Any) -> float:
    """`evaluate_nats` of a model of bytes, in bits."""
    return evaluate_nats(model, text_N, **arguments) / math.log(2)


@torch.no_grad()
def evaluate_nats(
    model: nn.Module, text_N: Any, *, segment: int = 128, streams: int = 1, device: Any = None, **options: Any
) -> float:
    """The mean cross entropy of a text, in nats per token; its exponential is the perplexity.

    Each of the N - 1 tokens after the first is predicted once. What came before reaches a prediction through the
    model's state, from segment to segment; a model without one sees its segment alone.

    Args:
        model: any model of this package. With a router whose answer for a token depends on other tokens, through a
            capacity or because experts choose, the result depends on `segment` and `streams`; if it depends on later
            tokens, there is a warning, as the model then sees what it is to predict.
        text_N: its tokens: a tensor of any whole dtype, also on another device, a NumPy array, a memory map of either,
            or a list.
        segment: tokens at once. A Transformer-XL is as exact and faster with a longer one.
        streams: the text is cut in so many parts, read side by side: faster, and each but the first starts without
            context.
        device: of the model; that of its first parameter if None.
        options: of the model's forward; for a Transformer-XL `memory_length=3800, same_length=True` evaluate with a
            longer memory than in training (section 4.1), to the same number whatever the segment is.
    """
    text_N = _checked(text_N)
    check_int("segment", segment, 1)
    check_int("streams", streams, 1)
    count = len(text_N) - 1
    if count < streams:
        raise ValueError(f"expected more tokens than streams; got streams={streams} and {count + 1} tokens")
    _warn_of_the_future(model)
    device = _device_of(model) if device is None else device
    length = count // streams
    starts, rest = range(0, length * streams, length), length * streams
    with evaluation_mode(model):
        total, state = _read(model, _segments(text_N, starts, length, segment, device), options)
        if rest < count:  # what does not divide follows the last stream
            last = None if state is None else state[:, -1:]
            total += _read(model, _segments(text_N, [rest], count - rest, segment, device), options, last)[0]
    return float(total) / count


def _checked(text_N: Any) -> Any:
    """A tensor or an array of one dimension and a whole dtype."""
    text_N = text_N if hasattr(text_N, "shape") else torch.tensor(text_N)
    dtype = _tensor(text_N[:0]).dtype if len(text_N.shape) == 1 else torch.bool
    if dtype.is_floating_point or dtype.is_complex or dtype == torch.bool:
        raise ValueError(f"the text must be whole numbers in one dimension; got {described(text_N)}")
    return text_N


def _tensor(part: Any) -> Tensor:
    return part if isinstance(part, Tensor) else torch.tensor(part)


def _device_of(model: nn.Module) -> torch.device:
    first = next(model.parameters(), None)
    if first is None:
        raise ValueError(f"{type(model).__name__} has no parameters to tell its device: give device")
    return first.device


def _warn_of_the_future(model: nn.Module) -> None:
    for name, layer in fastmoe.moe_layers(model).items():
        if not getattr(layer.router, "causal", True):
            warnings.warn(
                f"{name}: what {type(layer.router).__name__} gives a token depends, with these options, on later ones "
                "too: the model sees what it is to predict, and the result is not that of a language model",
                stacklevel=4,
            )
            return


def _segments(text_N: Any, starts: Iterable[int], length: int, segment: int, device: Any) -> Iterator[Tensor]:
    """A segment of each stream of this length, and the token after it: (streams, segment + 1)."""
    for first in range(0, length, segment):
        end = min(first + segment, length) + 1
        yield torch.stack([_tensor(text_N[start + first : start + end]).long() for start in starts]).to(device)


def _read(
    model: nn.Module, segments: Iterable[Tensor], options: dict[str, Any], state: Tensor | None = None
) -> tuple[float | Tensor, Tensor | None]:
    """The sum of all losses in float64, and the state at the end."""
    total: float | Tensor = 0.0
    for tokens_BS in segments:
        loss, state = language_model_step(model, tokens_BS[:, :-1], tokens_BS[:, 1:], state, **options)
        total = total + loss.double() * tokens_BS[:, 1:].numel()
    return total, state
