"""What one layer's last forward pass did."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class LayerStats:
    """Statistics of one forward pass. They stay on the device as tensors; reading a property waits for it.

    Attributes:
        offsets_E: int32, where each expert's rows end, rows sorted by expert.
        dropped_count: choices dropped for lack of capacity.
        loss_values: weighted balance losses by name, detached.
        mean_entropy: scalar, or None if the router gave no scores.
    """

    offsets_E: Tensor
    dropped_count: int | Tensor
    loss_values: Mapping[str, Tensor]
    mean_entropy: Tensor | None

    @property
    def counts(self) -> Tensor:
        """Rows that each expert computed, int64 `(E,)`, on the CPU."""
        ends_E = self.offsets_E.cpu().long()
        return torch.diff(ends_E, prepend=ends_E.new_zeros(1))

    @property
    def load(self) -> Tensor:
        """Share of the rows that each expert computed, float32 `(E,)`; sums to 1, all 0 where there was no row."""
        counts_E = self.counts
        return counts_E.float() / counts_E.sum().clamp(min=1)

    @property
    def dropped(self) -> int:
        """Choices dropped for lack of capacity."""
        return int(self.dropped_count)

    @property
    def losses(self) -> dict[str, float]:
        """Weighted balance losses by name."""
        return {name: float(value) for name, value in self.loss_values.items()}

    @property
    def entropy(self) -> float | None:
        """Mean over tokens of the entropy of the router's scores in nats, 0 to ln(E); None without scores."""
        return None if self.mean_entropy is None else float(self.mean_entropy)

    @property
    def dead(self) -> list[int]:
        """Experts that got no row."""
        return (self.counts == 0).nonzero().flatten().tolist()

    def __str__(self) -> str:
        load_E = self.load
        entropy = "-" if self.entropy is None else f"{self.entropy:.3f}"
        losses = ", ".join(f"{name} {value:.4g}" for name, value in self.losses.items()) or "none"
        return (
            f"{len(load_E)} experts, load {load_E.min():.1%} to {load_E.max():.1%}, {len(self.dead)} dead, "
            f"{self.dropped} dropped, entropy {entropy}, losses: {losses}"
        )


@torch.no_grad()
def mean_entropy(scores_TE: Tensor, token_mask_T: Tensor | None) -> Tensor:
    """Mean over tokens of the entropy of their scores, each token's scores scaled to sum to 1; False tokens left out.

    With S the sum of a token's scores s: `-sum s/S log(s/S) = log S + sum entr(s) / S`.
    """
    scores_TE = scores_TE.detach()
    total_T = scores_TE.sum(1)
    entropy_T = total_T.log() + torch.special.entr(scores_TE).sum(1) / total_T
    if token_mask_T is None:
        return entropy_T.sum() / max(entropy_T.numel(), 1)
    return torch.where(token_mask_T, entropy_T, 0).sum() / token_mask_T.sum().clamp(min=1)
