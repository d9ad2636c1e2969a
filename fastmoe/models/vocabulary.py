"""Input embedding and output softmax with one set of weights: plain, and adaptive for large vocabularies.

Both are called with tokens, as an embedding is; `logits` and `loss` are the way out.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def tied_softmax(vocab_size: int, d_model: int, cutoffs: Sequence[int], div_value: float) -> TiedSoftmax | TiedAdaptive:
    """A plain softmax, or an adaptive one where there are cutoffs."""
    return TiedAdaptive(vocab_size, d_model, cutoffs, div_value) if cutoffs else TiedSoftmax(vocab_size, d_model)


class TiedSoftmax(nn.Module):
    """Embeddings times sqrt(d_model) on the way in, the same matrix and a bias on the way out."""

    def __init__(self, vocab_size: int, d_model: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocab_size, d_model).normal_())
        self.bias = nn.Parameter(torch.zeros(vocab_size))

    def forward(self, tokens_BS: Tensor) -> Tensor:
        return F.embedding(tokens_BS, self.weight) * math.sqrt(self.weight.shape[1])

    def logits(self, x_BSD: Tensor) -> Tensor:
        return F.linear(x_BSD, self.weight, self.bias)

    def loss(self, x_BSD: Tensor, targets_BS: Tensor) -> Tensor:
        """The mean cross entropy in nats."""
        return cross_entropy(self.logits(x_BSD), targets_BS)


class TiedAdaptive(nn.Module):
    """Adaptive softmax (Grave et al. 2017, 1609.04309), its weights also the adaptive input embedding.

    Tokens are numbered from frequent to rare. Those below `cutoffs[0]` are in the head; cluster i of the rest has
    vectors of width `d_model / div_value ** (i + 1)` and a projection, used in both directions as in Baevski and Auli
    2019 (1809.10853). `torch.nn.AdaptiveLogSoftmaxWithLoss` holds all of them: nothing is stored twice, so the tie is
    exact, also in a checkpoint. It projects even where `div_value` is 1, and runs without autocast, which it does not
    know.
    """

    def __init__(self, vocab_size: int, d_model: int, cutoffs: Sequence[int], div_value: float) -> None:
        super().__init__()
        self.softmax = nn.AdaptiveLogSoftmaxWithLoss(d_model, vocab_size, list(cutoffs), div_value)

    def forward(self, tokens_BS: Tensor) -> Tensor:
        first, head_VD = self.softmax.cutoffs[0], self.softmax.head.weight
        x_BSD = F.embedding(tokens_BS.clamp(max=first - 1), head_VD)
        for cluster, tail in enumerate(self.softmax.tail):
            project, vectors = (linear.get_parameter("weight") for linear in tail.children())
            low, high = self.softmax.cutoffs[cluster : cluster + 2]
            inside_BS = (tokens_BS >= low) & (tokens_BS < high)
            from_cluster_RD = F.embedding(tokens_BS[inside_BS] - low, vectors) @ project
            x_BSD = x_BSD.index_put((inside_BS,), from_cluster_RD.to(x_BSD.dtype))
        return x_BSD * math.sqrt(head_VD.shape[1])

    def logits(self, x_BSD: Tensor) -> Tensor:
        """Log probabilities of all tokens."""
        with torch.autocast(x_BSD.device.type, enabled=False):
            return self.softmax.log_prob(self._rows(x_BSD)).unflatten(0, x_BSD.shape[:2])

    def loss(self, x_BSD: Tensor, targets_BS: Tensor) -> Tensor:
        """The mean cross entropy in nats."""
        with torch.autocast(x_BSD.device.type, enabled=False):
            return self.softmax(self._rows(x_BSD), targets_BS.flatten()).loss

    def _rows(self, x_BSD: Tensor) -> Tensor:
        return x_BSD.flatten(0, 1).to(self.softmax.head.weight.dtype)


def cross_entropy(logits_BSV: Tensor, targets_BS: Tensor) -> Tensor:
    """The mean cross entropy in nats, in float32 at least."""
    dtype = torch.promote_types(logits_BSV.dtype, torch.float32)
    return F.cross_entropy(logits_BSV.flatten(0, 1).to(dtype), targets_BS.flatten())
