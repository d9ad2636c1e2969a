"""`BaseGate`: what a gate is."""

from typing import Any

import torch.distributed as dist
from torch import Tensor, nn

from fastmoe._processes import ALONE, Processes
from fmoe.workers import GroupAttribute, workers


class BaseGate(nn.Module):
    """Chooses experts: `forward(x) -> (top_k_idx, top_k_val)`, and may leave a balance loss behind.

    A gate of one's own defines `forward`: `top_k_idx` int64 `(T, K)`, numbers of experts in 0..tot_expert-1, -1 for a
    choice that is dropped; `top_k_val` `(T, K)`, the weights of the experts' outputs.

    Args:
        num_expert: experts in each worker.
        world_size: workers with different experts.

    Attributes:
        tot_expert: E, num_expert * world_size.
        moe_group: the workers' process group, which `FMoE` sets; None means all processes.
        loss: the balance loss of the last pass; better asked for by `get_loss`.
    """

    moe_group = GroupAttribute()

    def __init__(self, num_expert: int, world_size: int) -> None:
        super().__init__()
        self.world_size, self.num_expert = world_size, num_expert
        self.tot_expert = world_size * num_expert
        self.moe_group = None
        self.loss: Tensor | None = None

    def forward(self, x: Any) -> tuple[Tensor, Tensor]:
        raise NotImplementedError(f"{type(self).__name__} must define forward(x) -> (top_k_idx, top_k_val)")

    def set_loss(self, loss: Tensor | None) -> None:
        """Leave a balance loss for the caller to add to theirs."""
        self.loss = loss

    def get_loss(self, clear: bool = True) -> Tensor | None:
        """The balance loss of the last pass, None if there is none; `clear` forgets it."""
        loss = self.loss
        if clear:
            self.loss = None
        return loss

    @property
    def has_loss(self) -> bool:
        """Whether a balance loss is there."""
        return self.loss is not None

    def sharers(self) -> Processes:
        """The workers whose tokens are one batch; this one alone where `torch.distributed` is not set up."""
        set_up = dist.is_available() and dist.is_initialized()
        return workers(self.world_size, self.moe_group) if set_up else ALONE
