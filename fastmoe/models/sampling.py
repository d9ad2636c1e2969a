"""Drawing a token from logits."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastmoe._errors import check_int, check_number

COLDEST = 1e-6  # below it, logits divided by the temperature may leave the range of float32


def sample(logits_BV: Tensor, temperature: float, top_k: int | None, generator: torch.Generator | None) -> Tensor:
    """One token per row, (B, 1), from the `top_k` likeliest ones (all where None); temperature 0 takes the likeliest.

    Raises:
        ValueError: a temperature below 0 or not finite, or so near 0 that 0 is meant; a `top_k` below 1.
    """
    if 0 < check_number("temperature", temperature) < COLDEST:
        raise ValueError(f"temperature must be 0 or at least {COLDEST}, got {temperature}")
    if temperature == 0:
        return logits_BV.argmax(dim=-1, keepdim=True)
    if top_k is not None:
        best_BK, ids_BK = logits_BV.topk(min(check_int("top_k", top_k, 1), logits_BV.shape[-1]))
        logits_BV = torch.full_like(logits_BV, -math.inf).scatter(-1, ids_BK, best_BK)
    return torch.multinomial((logits_BV / temperature).softmax(-1), 1, generator=generator)
