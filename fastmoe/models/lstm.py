"""An LSTM language model with one large MoE between its LSTM layers (Shazeer et al. 2017, 1701.06538, section 5.1).

    logits, loss, state = model(tokens_BS, targets_BS, state)

as of the Transformer-XL: `state` is None at the start of a text, later `(2 * layers, B, D)` without gradient, hidden
states first. With targets, `loss` is the mean cross entropy in nats and `logits` is None; a target of -100 is not
counted. Dense, with one feed-forward block in the MoE's place, or `LSTMConfig(num_experts=512, top_k=2)`, with noisy
top-k gating and its two balance losses.

The layers are those of appendix C.1: embedding, LSTM, MoE, LSTM, softmax, each output dropped out and added to the
layer's input, the MoE's through a sigmoid first. As there, the model is 512 wide, and an expert is 512->1024->512 with
ReLU.

Shapes: B sequences, S positions, D model width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fastmoe.models.checks import check_dropouts, check_sizes, check_state, check_tokens
from fastmoe.models.common import ExpertOptions, FeedForward, put_experts
from fastmoe.models.vocabulary import check_cutoffs, tied_softmax
from fastmoe.models.weights import draw_weights

INIT_STD = 0.02


@dataclass(frozen=True)
class LSTMConfig(ExpertOptions):
    vocab_size: int = 256
    d_model: int = 512
    d_hidden: int = 2048
    layers_before: int = 1
    layers_after: int = 1
    dropout: float = 0.0
    cutoffs: tuple[int, ...] = ()  # of an adaptive softmax; plain without
    div_value: float = 1.0
    router: str = "noisy_topk"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_sizes(self, 1, "vocab_size", "d_model", "d_hidden", "layers_before", "layers_after")
        check_dropouts(self, "dropout")
        check_cutoffs(self.vocab_size, self.d_model, self.cutoffs, self.div_value)


class LSTMLanguageModel(nn.Module):
    def __init__(self, config: LSTMConfig) -> None:
        super().__init__()
        self.config = config
        self.token_embedding = tied_softmax(config.vocab_size, config.d_model, config.cutoffs, config.div_value)
        self.lstms = nn.ModuleList(
            nn.LSTM(config.d_model, config.d_model, batch_first=True)
            for _ in range(config.layers_before + config.layers_after)
        )
        self.mlp = FeedForward(config.d_model, config.d_hidden, dropout=0.0)
        self.dropout = nn.Dropout(config.dropout)
        put_experts(self, [self], config, config.d_hidden, config.vocab_size)
        self.init_weights()

    def init_weights(self) -> None:
        """Matrices from N(0, 0.02), but the LSTMs as torch starts them; noisy top-k gating starts at zero."""
        for lstm in self.lstms:
            lstm.reset_parameters()  # type: ignore[operator]
        draw_weights(self, INIT_STD, INIT_STD)

    def forward(
        self, tokens_BS: Tensor, targets_BS: Tensor | None = None, state: Tensor | None = None
    ) -> tuple[Tensor | None, Tensor | None, Tensor]:
        tokens_BS, targets_BS = check_tokens(tokens_BS, targets_BS)
        x_BSD = self.dropout(self.token_embedding(tokens_BS))
        hidden, cells = self._start(state, x_BSD).chunk(2)
        after = []
        for layer, lstm in enumerate(self.lstms):
            if layer == self.config.layers_before:
                x_BSD = x_BSD + self.dropout(self.mlp(x_BSD).sigmoid())
            here = slice(layer, layer + 1)
            y_BSD, (hidden_1BD, cell_1BD) = lstm(x_BSD, (hidden[here].contiguous(), cells[here].contiguous()))
            after.append((hidden_1BD.detach(), cell_1BD.detach()))
            x_BSD = x_BSD + self.dropout(y_BSD)
        new_state = torch.cat([part for parts in zip(*after, strict=True) for part in parts])
        if targets_BS is None:
            return self.token_embedding.logits(x_BSD), None, new_state
        return None, self.token_embedding.loss(x_BSD, targets_BS), new_state

    def _start(self, state: Tensor | None, x_BSD: Tensor) -> Tensor:
        shape = (2 * len(self.lstms), x_BSD.shape[0], x_BSD.shape[2])
        return x_BSD.new_zeros(shape) if state is None else check_state("state", state, shape, x_BSD.dtype)
