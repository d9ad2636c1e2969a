"""Transformer-XL to read in a sitting (Dai et al. 2019, 1901.02860).

    logits, loss, memory = model(tokens_BS, targets_BS, memory)

`memory` is None at the start of a text, afterwards what the call for the segment before returned: a tensor
`(layers, B, M, D)` without gradient. With targets, `loss` is the mean cross entropy in nats and `logits` is None;
without, it is the other way round. `model.init_weights()` draws all weights anew, also after `fastmoe.moefy`.
`TransformerXLConfig(num_experts=64)` makes the feed-forward blocks MoE layers; `top_k`, `expert_hidden`, `moe_every`,
`router` and `router_options` say which.

Shapes: B sequences, S positions of the segment, M positions remembered, L = M + S, D model width, h heads, d width of a
head. Memory comes first, so that query i and key j are M + i - j positions apart.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastmoe._errors import check_int
from fastmoe.models.checks import check_dropouts, check_sizes, check_state, check_tokens
from fastmoe.models.common import ExpertOptions, FeedForward, put_experts
from fastmoe.models.vocabulary import check_cutoffs, tied_softmax
from fastmoe.models.weights import draw_weights

INIT_STD = 0.02


@dataclass(frozen=True)
class TransformerXLConfig(ExpertOptions):
    vocab_size: int = 256
    n_layer: int = 12
    n_head: int = 8
    d_model: int = 512
    d_hidden: int = 2048
    dropout: float = 0.0
    hidden_dropout: float | None = None  # inside the feed-forward block; that of `dropout` if None
    attention_dropout: float = 0.0
    memory_length: int = 512  # 0: none
    clamp_distance: int | None = None  # positions further apart count as this far
    pre_norm: bool = False  # the norm before each block instead of after its residual sum
    cutoffs: tuple[int, ...] = ()  # of an adaptive softmax; plain without
    div_value: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_sizes(self, 1, "vocab_size", "n_layer", "n_head", "d_model", "d_hidden")
        check_sizes(self, 0, "memory_length", "clamp_distance")
        check_dropouts(self, "dropout", "hidden_dropout", "attention_dropout")
        check_cutoffs(self.vocab_size, self.d_model, self.cutoffs, self.div_value)
        if self.d_model % self.n_head or self.d_model % 2:
            raise ValueError(f"d_model must be even and a multiple of n_head={self.n_head}; got {self.d_model}")


class RelativeAttention(nn.Module):
    """Attention by content and distance, section 3.3: terms (a) to (d), `u` and `v` of each layer its own."""

    def __init__(self, config: TransformerXLConfig) -> None:
        super().__init__()
        D, self.n_head, self.dropout = config.d_model, config.n_head, config.attention_dropout
        self.q_proj = nn.Linear(D, D, bias=False)
        self.kv_proj = nn.Linear(D, 2 * D, bias=False)
        self.position_proj = nn.Linear(D, D, bias=False)
        self.c_proj = nn.Linear(D, D, bias=False)
        self.u = nn.Parameter(torch.empty(self.n_head, 1, D // self.n_head))
        self.v = nn.Parameter(torch.empty(self.n_head, 1, D // self.n_head))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Its own parameters, `u` and `v`, to zero."""
        nn.init.zeros_(self.u)
        nn.init.zeros_(self.v)

    def forward(self, x_BSD: Tensor, context_BLD: Tensor, positions_LD: Tensor, hidden_SL: Tensor) -> Tensor:
        """`positions_LD` are for the distances from L - 1 down to 0; where `hidden_SL`, a query does not see a key."""
        q_BhSd = self._heads(self.q_proj(x_BSD))
        k_BhLd, v_BhLd = map(self._heads, self.kv_proj(context_BLD).chunk(2, -1))
        r_hLd = self._heads(self.position_proj(positions_LD))
        scale = q_BhSd.shape[-1] ** -0.5
        by_distance_BhSL = relative_shift((q_BhSd + self.v) @ r_hLd.mT) * scale  # (b) and (d)
        y_BhSd = F.scaled_dot_product_attention(
            q_BhSd + self.u.to(q_BhSd.dtype),  # (a) and (c)
            k_BhLd,
            v_BhLd,
            attn_mask=by_distance_BhSL.masked_fill(hidden_SL, -math.inf).to(q_BhSd.dtype),
            dropout_p=self.dropout if self.training else 0.0,
            scale=scale,
        )
        return self.c_proj(y_BhSd.transpose(-3, -2).flatten(-2))

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.n_head, -1)).transpose(-3, -2)


def relative_shift(x_BhSL: Tensor) -> Tensor:
    """From columns by distance, L - 1 down to 0, to columns by key (appendix B): row i moves left by S - 1 - i.

    A column in front of each row makes it L + 1 long; read in rows of L, each then starts one further to the left. What
    moves in from the right is of later keys, to be hidden.
    """
    S, L = x_BhSL.shape[-2:]
    return F.pad(x_BhSL, (1, 0)).flatten(-2)[..., S:].unflatten(-1, (S, L))


class Block(nn.Module):
    def __init__(self, config: TransformerXLConfig) -> None:
        super().__init__()
        self.pre_norm = config.pre_norm
        hidden_dropout = config.dropout if config.hidden_dropout is None else config.hidden_dropout
        self.attention_norm, self.mlp_norm = nn.LayerNorm(config.d_model), nn.LayerNorm(config.d_model)
        self.attention = RelativeAttention(config)
        self.mlp = FeedForward(config.d_model, config.d_hidden, hidden_dropout)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x_BSD: Tensor, memory_BMD: Tensor, positions_LD: Tensor, hidden_SL: Tensor) -> Tensor:
        context_BLD = torch.cat([memory_BMD, x_BSD], dim=1)
        if self.pre_norm:
            context_BLD = self.attention_norm(context_BLD)
            queries_BSD = context_BLD[:, memory_BMD.shape[1] :]
            x_BSD = x_BSD + self.dropout(self.attention(queries_BSD, context_BLD, positions_LD, hidden_SL))
            return x_BSD + self.dropout(self.mlp(self.mlp_norm(x_BSD)))
        y_BSD = self.attention(x_BSD, context_BLD, positions_LD, hidden_SL)
        x_BSD = self.attention_norm(x_BSD + self.dropout(y_BSD))
        return self.mlp_norm(x_BSD + self.dropout(self.mlp(x_BSD)))


class TransformerXL(nn.Module):
    def __init__(self, config: TransformerXLConfig) -> None:
        super().__init__()
        self.config = config
        self.token_embedding = tied_softmax(config.vocab_size, config.d_model, config.cutoffs, config.div_value)
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.final_norm = nn.LayerNorm(config.d_model) if config.pre_norm else nn.Identity()
        put_experts(self, self.blocks, config, config.d_hidden, config.vocab_size)
        self.init_weights()

    def init_weights(self) -> None:
        """All from N(0, 0.02); with pre-norm, what writes into the residual stream is scaled by 1/sqrt(2 n_layer)."""
        draw_weights(
            self, INIT_STD, INIT_STD / math.sqrt(2 * self.config.n_layer) if self.config.pre_norm else INIT_STD
        )

    def forward(
        self,
        tokens_BS: Tensor,
        targets_BS: Tensor | None = None,
        memory: Tensor | None = None,
        *,
        memory_length: int | None = None,
        same_length: bool = False,
    ) -> tuple[Tensor | None, Tensor | None, Tensor]:
        """Logits or the loss, and the memory for the next segment (section 3.2).

        Args:
            tokens_BS, targets_BS: a segment, and the token after each of its tokens; a target of -100 is not counted.
            memory: of the segment before. All of it is attended to, also what is longer than `memory_length`, unless
                `same_length`.
            memory_length: how much of the past to remember; that of the config if None.
            same_length: each position sees itself and the `memory_length` ones before it. Otherwise also the whole
                segment before it, so that later positions see more. With it, results do not depend on how a text is
                cut into segments, unless a router compares tokens.
        """
        tokens_BS, targets_BS = check_tokens(tokens_BS, targets_BS)
        length = self.config.memory_length if memory_length is None else check_int("memory_length", memory_length, 0)
        x_BSD = self.dropout(self.token_embedding(tokens_BS))
        memory_NBMD = self._start(memory, x_BSD)
        S, M = tokens_BS.shape[1], memory_NBMD.shape[2]
        L = M + S
        distance_SL = self._distances(S, M, tokens_BS.device)
        hidden_SL = (distance_SL < 0) | (distance_SL > length) if same_length else distance_SL < 0
        farthest_first_L = torch.arange(L - 1, -1, -1, device=tokens_BS.device)
        positions_LD = self.dropout(self._positions(farthest_first_L).to(x_BSD.dtype))
        remembered = []
        for block, memory_BMD in zip(self.blocks, memory_NBMD, strict=True):
            remembered.append(torch.cat([memory_BMD, x_BSD.detach()], dim=1)[:, max(0, L - length) :])
            x_BSD = block(x_BSD, memory_BMD, positions_LD, hidden_SL)
        x_BSD, new_memory = self.dropout(self.final_norm(x_BSD)), torch.stack(remembered)
        if targets_BS is None:
            return self.token_embedding.logits(x_BSD), None, new_memory
        return None, self.token_embedding.loss(x_BSD, targets_BS), new_memory

    def _start(self, memory: Tensor | None, x_BSD: Tensor) -> Tensor:
        (B, _, D), layers = x_BSD.shape, self.config.n_layer
        if memory is None:
            return x_BSD.new_zeros(layers, B, 0, D)
        return check_state("memory", memory, (layers, B, "M", D), x_BSD.dtype)

    @staticmethod
    def _distances(S: int, M: int, device: torch.device) -> Tensor:
        """How far key j is before query i, (S, M + S); below 0 it comes after."""
        return M + torch.arange(S, device=device)[:, None] - torch.arange(M + S, device=device)

    def _positions(self, distance_L: Tensor) -> Tensor:
        """Sinusoids of distances, `R` of section 3.3."""
        limit, D = self.config.clamp_distance, self.config.d_model
        distance_L = distance_L if limit is None else distance_L.clamp(max=limit)
        frequencies = 10000.0 ** (-torch.arange(0, D, 2, device=distance_L.device, dtype=torch.float64) / D)
        angles = distance_L[:, None] * frequencies
        return torch.cat([angles.sin(), angles.cos()], dim=-1)
