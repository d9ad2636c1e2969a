"""Input embedding and output softmax with one set of weights: plain, and adaptive for large vocabularies.

Both are called with tokens, as an embedding is; `logits` and `loss` are the way out. Losses are in float32 at least,
whatever the dtype of the weights, and a target of -100 is not counted.

Shapes: B sequences, S positions, R = B * S rows, D model width, V vocabulary, C rows of the adaptive head.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastmoe._errors import check_number

NOT_COUNTED = -100


def check_cutoffs(vocab_size: int, d_model: int, cutoffs: Sequence[int], div_value: float) -> None:
    """Raises ValueError: clusters without tokens, or with vectors of no width."""
    check_number("div_value", div_value, 1)
    whole = all(isinstance(cutoff, int) for cutoff in cutoffs)
    if not whole or any(low >= high for low, high in itertools.pairwise((0, *cutoffs, vocab_size))):
        raise ValueError(f"cutoffs must be rising whole numbers from 1 to {vocab_size - 1}; got {cutoffs}")
    if d_model < div_value ** len(cutoffs):
        raise ValueError(
            f"d_model must be at least div_value ** {len(cutoffs)}, or the last cluster's vectors have no width; "
            f"got d_model={d_model}, div_value={div_value}"
        )


def tied_softmax(vocab_size: int, d_model: int, cutoffs: Sequence[int], div_value: float) -> TiedSoftmax | TiedAdaptive:
    """A plain softmax, or an adaptive one where there are cutoffs."""
    return TiedAdaptive(vocab_size, d_model, cutoffs, div_value) if cutoffs else TiedSoftmax(vocab_size, d_model)


class TiedSoftmax(nn.Module):
    """Embeddings times sqrt(d_model) on the way in, the same matrix and a bias on the way out."""

    def __init__(self, vocab_size: int, d_model: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocab_size, d_model))
        self.bias = nn.Parameter(torch.empty(vocab_size))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """As `nn.Embedding` and a bias of zero."""
        nn.init.normal_(self.weight)
        nn.init.zeros_(self.bias)

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
    2019 (1809.10853), also where `div_value` is 1. `torch.nn.AdaptiveLogSoftmaxWithLoss` holds all of them: nothing is
    stored twice, so the tie is exact, also in a checkpoint. Its own arithmetic is that of the weights' dtype, so it is
    written out here.
    """

    def __init__(self, vocab_size: int, d_model: int, cutoffs: Sequence[int], div_value: float) -> None:
        super().__init__()
        self.softmax = nn.AdaptiveLogSoftmaxWithLoss(d_model, vocab_size, list(cutoffs), div_value)

    def _clusters(self) -> Iterator[tuple[int, int, nn.Module]]:
        """First token, end and matrices of each."""
        for (low, high), tail in zip(itertools.pairwise(self.softmax.cutoffs), self.softmax.tail, strict=True):
            yield low, high, tail

    def forward(self, tokens_BS: Tensor) -> Tensor:
        head_CD, (first, *_, vocab_size) = self.softmax.head.weight, self.softmax.cutoffs
        rare_BS = (tokens_BS >= first) & (tokens_BS < vocab_size)  # others outside of the head are errors
        x_BSD = F.embedding(tokens_BS.masked_fill(rare_BS, 0), head_CD)
        for low, high, tail in self._clusters():
            project, vectors = (linear.get_parameter("weight") for linear in tail.children())
            inside_BS = (tokens_BS >= low) & (tokens_BS < high)
            from_cluster_RD = F.embedding(tokens_BS[inside_BS] - low, vectors) @ project
            x_BSD = x_BSD.index_put((inside_BS,), from_cluster_RD.to(x_BSD.dtype))
        return x_BSD * math.sqrt(head_CD.shape[1])

    def logits(self, x_BSD: Tensor) -> Tensor:
        """Log probabilities of all tokens."""
        first = self.softmax.cutoffs[0]
        head_BSC = at_least_float32(self.softmax.head(x_BSD)).log_softmax(-1)
        parts = [head_BSC[..., :first]]
        for cluster, (_, _, tail) in enumerate(self._clusters(), first):
            parts.append(head_BSC[..., cluster, None] + at_least_float32(tail(x_BSD)).log_softmax(-1))
        return torch.cat(parts, dim=-1)

    def loss(self, x_BSD: Tensor, targets_BS: Tensor) -> Tensor:
        """The mean cross entropy in nats: of the head, and for rare tokens of their cluster."""
        x_RD, targets_R = x_BSD.flatten(0, 1), targets_BS.flatten()
        head_targets_R, losses = targets_R, []
        for cluster, (low, high, tail) in enumerate(self._clusters(), self.softmax.cutoffs[0]):
            inside_R = (targets_R >= low) & (targets_R < high)
            head_targets_R = head_targets_R.masked_fill(inside_R, cluster)
            losses.append(cross_entropy(tail(x_RD[inside_R]), targets_R[inside_R] - low, reduction="sum"))
        losses.append(cross_entropy(self.softmax.head(x_RD), head_targets_R, reduction="sum"))
        return torch.stack(losses).sum() / (targets_R != NOT_COUNTED).sum()


def cross_entropy(logits: Tensor, targets: Tensor, reduction: str = "mean") -> Tensor:
    """In nats, of logits (..., V)."""
    logits_RV = at_least_float32(logits.flatten(0, -2))
    return F.cross_entropy(logits_RV, targets.flatten(), ignore_index=NOT_COUNTED, reduction=reduction)


def at_least_float32(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
