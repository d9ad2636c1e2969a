"""Causal self-attention: grouped queries, rotary positions, and a cache of keys and values.

Shapes: B sequences, S new positions, M cached ones, D model width, h heads, g groups of heads that share keys and
values, d width of a head.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

if TYPE_CHECKING:
    from fastmoe.models.gpt import GPTConfig


class LayerCache:
    """Keys and values of one layer, (B, g, M, d)."""

    def __init__(self) -> None:
        self.keys: Tensor | None = None
        self.values: Tensor | None = None

    @property
    def length(self) -> int:
        return 0 if self.keys is None else self.keys.shape[2]

    def extend(self, keys_BgSd: Tensor, values_BgSd: Tensor) -> tuple[Tensor, Tensor]:
        """All keys and values, the new ones last."""
        if self.keys is not None and self.values is not None:
            keys_BgSd = torch.cat([self.keys, keys_BgSd], dim=2)
            values_BgSd = torch.cat([self.values, values_BgSd], dim=2)
        self.keys, self.values = keys_BgSd, values_BgSd
        return keys_BgSd, values_BgSd


def cached_length(caches: Sequence[LayerCache], layers: int, B: int) -> int:
    """How many positions the caches of a model's blocks hold.

    Raises:
        ValueError: not one for each block; not all equally long, or of other than B sequences.
    """
    held = {(B if cache.keys is None else cache.keys.shape[0], cache.length) for cache in caches}
    if len(caches) != layers or held != {(B, caches[0].length)}:
        raise ValueError(
            f"caches must be {layers}, one for each block, equally long and of B={B} sequences; "
            f"got {len(caches)} with (sequences, length) {sorted(held)}"
        )
    return caches[0].length


class CausalSelfAttention(nn.Module):
    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        d = config.head_width
        self.n_head = config.n_head
        self.n_kv_head = config.n_head if config.n_kv_head is None else config.n_kv_head
        self.dropout = config.dropout
        self.rotary_base = config.rotary_base if config.positions == "rotary" else None
        self.qkv_proj = nn.Linear(config.d_model, (self.n_head + 2 * self.n_kv_head) * d, bias=config.bias)
        self.c_proj = nn.Linear(self.n_head * d, config.d_model, bias=config.bias)
        self.output_dropout = nn.Dropout(config.dropout)

    def forward(self, x_BSD: Tensor, cache: LayerCache | None = None) -> Tensor:
        heads_BSHd = self.qkv_proj(x_BSD).unflatten(-1, (self.n_head + 2 * self.n_kv_head, -1))
        q_BhSd, k_BgSd, v_BgSd = heads_BSHd.transpose(1, 2).split([self.n_head, self.n_kv_head, self.n_kv_head], dim=1)
        M = 0 if cache is None else cache.length
        if self.rotary_base is not None:
            q_BhSd, k_BgSd = (rotate(x, M, self.rotary_base) for x in (q_BhSd, k_BgSd))
        if cache is not None:
            k_BgSd, v_BgSd = cache.extend(k_BgSd, v_BgSd)
        y_BhSd = F.scaled_dot_product_attention(
            q_BhSd,
            k_BgSd,
            v_BgSd,
            attn_mask=visible_after(M, x_BSD.shape[1], x_BSD.device) if M else None,
            is_causal=not M,
            dropout_p=self.dropout if self.training else 0.0,
            enable_gqa=self.n_kv_head < self.n_head,
        )
        return self.output_dropout(self.c_proj(y_BhSd.transpose(1, 2).flatten(-2)))


def visible_after(M: int, S: int, device: torch.device) -> Tensor:
    """Which of M + S positions each of the last S sees."""
    return torch.ones(S, M + S, dtype=torch.bool, device=device).tril(M)


def rotate(x_BhSd: Tensor, first: int, base: float) -> Tensor:
    """Rotary positions `first`, `first` + 1, ... (Su et al. 2021, 2104.09864, section 3.2.2).

    Each pair, of a feature and the one half a head further, is turned by an angle that grows with the position.
    """
    S, d = x_BhSd.shape[-2:]
    dtype = torch.promote_types(x_BhSd.dtype, torch.float32)
    positions_S = torch.arange(first, first + S, device=x_BhSd.device, dtype=dtype)
    frequencies = base ** (-torch.arange(0, d, 2, device=x_BhSd.device, dtype=dtype) / d)
    angles = positions_S[:, None] * frequencies
    cos, sin = angles.cos().to(x_BhSd.dtype), angles.sin().to(x_BhSd.dtype)
    a, b = x_BhSd.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)
