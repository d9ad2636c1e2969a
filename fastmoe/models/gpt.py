"""A GPT to read in a sitting.

    logits, loss = model(tokens_BS, targets_BS)

Shapes: B sequences, S positions, D model width, H hidden width, V vocabulary, h heads, d width of a head.
Its feed-forward block has the attributes that `fastmoe.moefy` looks for (`c_fc`, `act`, `c_proj`, `dropout`),
so that `fastmoe.moefy(GPT(config), num_experts=8)` is all it takes to make it a Mixture-of-Experts;
`GPTConfig(num_experts=8)` does it when it is built.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fastmoe._errors import check_choice, check_int, check_number
from fastmoe.models.attention import CausalSelfAttention, LayerCache, cached_length
from fastmoe.models.checks import check_dropouts, check_sizes, check_tokens
from fastmoe.models.common import ExpertOptions, evaluation_mode, put_experts, tokens_go_alone
from fastmoe.models.sampling import sample
from fastmoe.models.vocabulary import cross_entropy
from fastmoe.models.weights import accept_one_matrix, draw_weights, is_tied, tie, tie_again

INIT_STD = 0.02


@dataclass(frozen=True)
class GPTConfig(ExpertOptions):
    vocab_size: int = 256
    block_size: int = 256
    n_layer: int = 6
    n_head: int = 6
    d_model: int = 384
    d_hidden: int | None = None  # 4 * d_model if None
    dropout: float = 0.0
    bias: bool = False
    n_kv_head: int | None = None  # fewer than n_head: each serves several (Ainslie et al. 2023, 2305.13245)
    d_head: int | None = None  # d_model / n_head if None
    positions: str = "learned"  # or "rotary"
    rotary_base: float = 10000.0
    norm: str = "layer"  # or "rms"
    tied: bool = True  # one matrix for the embedding and the head
    # In the backward pass, compute the inside of every block again: less memory, more time. With a router by token ids
    # ("hash"), run it before the next forward pass: it takes the ids of the latest.
    recompute: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_sizes(
            self, 1, "vocab_size", "block_size", "n_layer", "n_head", "d_model", "d_hidden", "n_kv_head", "d_head"
        )
        check_dropouts(self, "dropout")
        check_number("rotary_base", self.rotary_base, 1)
        if self.d_head is None and self.d_model % self.n_head:
            raise ValueError(f"d_model must be a multiple of n_head; got d_model={self.d_model}, n_head={self.n_head}")
        if self.n_kv_head is not None and self.n_head % self.n_kv_head:
            raise ValueError(f"n_head={self.n_head} must be a multiple of n_kv_head; got {self.n_kv_head}")
        check_choice("positions", self.positions, ("learned", "rotary"))
        check_choice("norm", self.norm, ("layer", "rms"))
        if self.positions == "rotary" and self.head_width % 2:
            raise ValueError(f"rotary positions need heads of even width; got {self.head_width}")

    @property
    def head_width(self) -> int:
        return self.d_model // self.n_head if self.d_head is None else self.d_head

    @property
    def hidden_width(self) -> int:
        return 4 * self.d_model if self.d_hidden is None else self.d_hidden


def make_norm(config: GPTConfig) -> nn.Module:
    return nn.RMSNorm(config.d_model) if config.norm == "rms" else nn.LayerNorm(config.d_model, bias=config.bias)


class MLP(nn.Module):
    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.c_fc = nn.Linear(config.d_model, config.hidden_width, bias=config.bias)
        self.act = nn.GELU()
        self.c_proj = nn.Linear(config.hidden_width, config.d_model, bias=config.bias)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x_BSD: Tensor) -> Tensor:
        return self.dropout(self.c_proj(self.act(self.c_fc(x_BSD))))


class Block(nn.Module):
    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.attention_norm = make_norm(config)
        self.attention = CausalSelfAttention(config)
        self.mlp_norm = make_norm(config)
        self.mlp = MLP(config)

    def forward(self, x_BSD: Tensor, cache: LayerCache | None = None) -> Tensor:
        x_BSD = x_BSD + self.attention(self.attention_norm(x_BSD), cache)
        return x_BSD + self.mlp(self.mlp_norm(x_BSD))


class GPT(nn.Module):
    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config
        self.token_embedding = nn.Embedding(config.vocab_size, config.d_model)
        if config.positions == "learned":
            self.position_embedding = nn.Embedding(config.block_size, config.d_model)
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.final_norm = make_norm(config)
        self.head = nn.Linear(config.d_model, config.vocab_size, bias=False)
        if config.tied:
            tie(self)
            self.register_load_state_dict_pre_hook(accept_one_matrix)
            self.register_load_state_dict_post_hook(tie_again)
        put_experts(self, self.blocks, config, config.hidden_width, config.vocab_size)
        self.init_weights()

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> GPT:
        """`Module.to`, `to_empty` and the like, which make two matrices of one where they make new ones."""
        tied = is_tied(self)
        super()._apply(fn, recurse)
        if tied:
            tie(self)
        return self

    def init_weights(self) -> None:
        """Draw every matrix from N(0, 0.02); what writes into the residual stream is scaled by 1/sqrt(2 n_layer).

        Experts included: called after `moefy`, it gives an MoE twin the same start.
        """
        draw_weights(self, INIT_STD, INIT_STD / math.sqrt(2 * self.config.n_layer))

    def forward(
        self, tokens_BS: Tensor, targets_BS: Tensor | None = None, *, caches: list[LayerCache] | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Logits (B, S, V), and the mean cross entropy in nats where targets are given; targets of -100 do not count.

        With `caches`, one for each block, the tokens follow those that the caches have seen, and are added to them.
        """
        tokens_BS, targets_BS = check_tokens(tokens_BS, targets_BS)
        B, S = tokens_BS.shape
        M = 0 if caches is None else cached_length(caches, len(self.blocks), B)
        if self.config.block_size < M + S:
            raise ValueError(f"expected at most block_size={self.config.block_size} positions; got {M + S}")
        x_BSD = self.token_embedding(tokens_BS)
        if self.config.positions == "learned":
            x_BSD = x_BSD + self.position_embedding(torch.arange(M, M + S, device=tokens_BS.device))
        x_BSD = self.dropout(x_BSD)
        for layer, block in enumerate(self.blocks):
            if self.config.recompute and self.training and caches is None:
                x_BSD = checkpoint(block, x_BSD, use_reentrant=False)
            else:
                x_BSD = block(x_BSD, None if caches is None else caches[layer])
        logits_BSV = self.head(self.final_norm(x_BSD))
        return logits_BSV, None if targets_BS is None else cross_entropy(logits_BSV, targets_BS)

    @torch.no_grad()
    def generate(
        self,
        tokens_BS: Tensor,
        n: int,
        temperature: float = 1.0,
        top_k: int | None = None,
        generator: torch.Generator | None = None,
        use_cache: bool | None = None,
    ) -> Tensor:
        """`tokens_BS` with `n` sampled tokens appended; temperature 0 takes the likeliest token each time.

        With the cache a step computes the new position alone, to the same logits up to rounding, as long as all fits
        into `block_size`; past it the context's first token leaves with each step, and everything is computed anew.
        None uses it unless a router has a capacity or lets experts choose, which makes tokens depend on each other.
        """
        check_int("n", n, 0)
        tokens_BS, _ = check_tokens(tokens_BS)
        use_cache = tokens_go_alone(self) if use_cache is None else use_cache
        caches = [LayerCache() for _ in self.blocks] if use_cache else None
        with evaluation_mode(self):
            for _ in range(n):
                past_the_block = max(0, tokens_BS.shape[1] - self.config.block_size)
                caches = None if past_the_block else caches
                start = past_the_block if caches is None else caches[0].length
                logits_BSV, _ = self(tokens_BS[:, start:], caches=caches)
                next_B1 = sample(logits_BSV[:, -1].float(), temperature, top_k, generator)
                tokens_BS = torch.cat([tokens_BS, next_B1], dim=1)
        return tokens_BS
