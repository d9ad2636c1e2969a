"""A byte-level GPT to read in a sitting.

Shapes: B sequences, S positions, D model width, H hidden width, V vocabulary, h heads, d width of a head.
Its feed-forward block has the attributes that `fastmoe.moefy` looks for (`c_fc`, `act`, `c_proj`, `dropout`),
so that `fastmoe.moefy(GPT(config), num_experts=8)` is all it takes to make it a Mixture-of-Experts.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

INIT_STD = 0.02
RESIDUAL_OUTPUTS = ("c_proj.weight", "experts.w2")


@dataclass(frozen=True)
class GPTConfig:
    vocab_size: int = 256
    block_size: int = 256
    n_layer: int = 6
    n_head: int = 6
    d_model: int = 384
    d_hidden: int | None = None  # 4 * d_model if None
    dropout: float = 0.0
    bias: bool = False

    def __post_init__(self) -> None:
        if self.d_model % self.n_head:
            raise ValueError(f"d_model must be a multiple of n_head; got d_model={self.d_model}, n_head={self.n_head}")


class CausalSelfAttention(nn.Module):
    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.n_head = config.n_head
        self.dropout = config.dropout
        self.qkv_proj = nn.Linear(config.d_model, 3 * config.d_model, bias=config.bias)
        self.c_proj = nn.Linear(config.d_model, config.d_model, bias=config.bias)
        self.output_dropout = nn.Dropout(config.dropout)

    def forward(self, x_BSD: Tensor) -> Tensor:
        q_BhSd, k_BhSd, v_BhSd = (
            part_BSD.unflatten(-1, (self.n_head, -1)).transpose(1, 2) for part_BSD in self.qkv_proj(x_BSD).chunk(3, -1)
        )
        y_BhSd = F.scaled_dot_product_attention(
            q_BhSd, k_BhSd, v_BhSd, is_causal=True, dropout_p=self.dropout if self.training else 0.0
        )
        return self.output_dropout(self.c_proj(y_BhSd.transpose(1, 2).flatten(-2)))


class MLP(nn.Module):
    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        d_hidden = 4 * config.d_model if config.d_hidden is None else config.d_hidden
        self.c_fc = nn.Linear(config.d_model, d_hidden, bias=config.bias)
        self.act = nn.GELU()
        self.c_proj = nn.Linear(d_hidden, config.d_model, bias=config.bias)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x_BSD: Tensor) -> Tensor:
        return self.dropout(self.c_proj(self.act(self.c_fc(x_BSD))))


class Block(nn.Module):
    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(config.d_model, bias=config.bias)
        self.attention = CausalSelfAttention(config)
        self.mlp_norm = nn.LayerNorm(config.d_model, bias=config.bias)
        self.mlp = MLP(config)

    def forward(self, x_BSD: Tensor) -> Tensor:
        x_BSD = x_BSD + self.attention(self.attention_norm(x_BSD))
        return x_BSD + self.mlp(self.mlp_norm(x_BSD))


class GPT(nn.Module):
    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config
        self.token_embedding = nn.Embedding(config.vocab_size, config.d_model)
        self.position_embedding = nn.Embedding(config.block_size, config.d_model)
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.final_norm = nn.LayerNorm(config.d_model, bias=config.bias)
        self.head = nn.Linear(config.d_model, config.vocab_size, bias=False)
        self.head.weight = self.token_embedding.weight
        self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """Draw every matrix from N(0, 0.02); what writes into the residual stream is scaled by 1/sqrt(2 n_layer).

        It goes by parameter names, experts included: called after `moefy`, it gives an MoE twin the same start.
        """
        residual_std = INIT_STD / math.sqrt(2 * self.config.n_layer)
        for name, parameter in self.named_parameters():
            if "norm" in name:
                continue
            if name.endswith(("bias", "experts.b1", "experts.b2")):
                parameter.zero_()
            else:
                parameter.normal_(std=residual_std if name.endswith(RESIDUAL_OUTPUTS) else INIT_STD)

    def forward(self, tokens_BS: Tensor, targets_BS: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Logits (B, S, V), and the mean cross entropy in nats where targets are given."""
        S, limit = tokens_BS.shape[1], self.config.block_size
        if limit < S:
            raise ValueError(f"expected at most block_size={limit} positions; got {S}")
        positions_S = torch.arange(S, device=tokens_BS.device)
        x_BSD = self.dropout(self.token_embedding(tokens_BS) + self.position_embedding(positions_S))
        for block in self.blocks:
            x_BSD = block(x_BSD)
        logits_BSV = self.head(self.final_norm(x_BSD))
        if targets_BS is None:
            return logits_BSV, None
        return logits_BSV, F.cross_entropy(logits_BSV.flatten(0, 1).float(), targets_BS.flatten())

    @torch.no_grad()
    def generate(
        self,
        tokens_BS: Tensor,
        n: int,
        temperature: float = 1.0,
        top_k: int | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """`tokens_BS` with `n` sampled tokens appended; temperature 0 takes the likeliest token each time."""
        was_training = self.training
        self.eval()
        for _ in range(n):
            logits_BSV, _ = self(tokens_BS[:, -self.config.block_size :])
            next_B1 = sample(logits_BSV[:, -1].float(), temperature, top_k, generator)
            tokens_BS = torch.cat([tokens_BS, next_B1], dim=1)
        self.train(was_training)
        return tokens_BS


def sample(logits_BV: Tensor, temperature: float, top_k: int | None, generator: torch.Generator | None) -> Tensor:
    """One token per row, (B, 1), from the `top_k` likeliest ones (all where None)."""
    if temperature == 0:
        return logits_BV.argmax(dim=-1, keepdim=True)
    if top_k is not None and top_k < logits_BV.shape[-1]:
        lowest_B1 = logits_BV.topk(top_k).values[:, -1:]
        logits_BV = logits_BV.masked_fill(logits_BV < lowest_B1, -math.inf)
    return torch.multinomial((logits_BV / temperature).softmax(-1), 1, generator=generator)
