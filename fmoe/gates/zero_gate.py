"""`ZeroGate`: everything to expert 0."""

import torch
from torch import Tensor

from fmoe.gates.base_gate import BaseGate


class ZeroGate(BaseGate):
    """All K choices of every token are expert 0, each with weight 1/K; no parameters.

    Args:
        _d_model: not looked at.
        num_expert: experts in each worker.
        world_size: workers with different experts.
        top_k: K.
    """

    def __init__(self, _d_model: int, num_expert: int, world_size: int, top_k: int = 2) -> None:
        super().__init__(num_expert, world_size)
        self.top_k = top_k

    def forward(self, inp: Tensor) -> tuple[Tensor, Tensor]:
        """Expert 0 and 1/K, both `(T, K)`."""
        expert_ids_TK = torch.zeros(len(inp), self.top_k, dtype=torch.int64, device=inp.device)
        return expert_ids_TK, torch.full_like(expert_ids_TK, 1 / self.top_k, dtype=inp.dtype)
