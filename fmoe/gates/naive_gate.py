"""`NaiveGate`: a linear layer, the K best experts, softmax."""

from typing import Any

import torch
from torch import Tensor, nn

from fmoe.gates.base_gate import BaseGate


class NaiveGate(BaseGate):
    """The K largest logits of a linear layer; weights are the softmax over those K.

    With K = 1 that softmax is always 1 and the gate would never learn; there the weight is the chosen expert's
    probability among all experts. `top1_weight_one` gives FastMoE's 1 instead.

    Args:
        d_model: D.
        num_expert: experts in each worker.
        world_size: workers with different experts.
        top_k: K.
        gate_bias: whether the linear layer has a bias.
        top1_weight_one: FastMoE's constant weight where K = 1.

    Raises:
        ValueError: more experts chosen than there are.
    """

    def __init__(
        self,
        d_model: int,
        num_expert: int,
        world_size: int,
        top_k: int = 2,
        gate_bias: bool = True,
        top1_weight_one: bool = False,
    ) -> None:
        super().__init__(num_expert, world_size)
        if not 1 <= top_k <= self.tot_expert:
            raise ValueError(f"top_k must be from 1 to the number of experts, {self.tot_expert}, got {top_k}")
        self.gate = nn.Linear(d_model, self.tot_expert, bias=gate_bias)
        self.top_k, self.top1_weight_one = top_k, top1_weight_one

    def forward(self, inp: Tensor, return_all_scores: bool = False) -> Any:
        """The chosen experts, best first, and their weights, both `(T, K)`.

        Args:
            inp: `(T, D)`, or with more leading dimensions, which become one.
            return_all_scores: also return the logits, `(T, E)`.
        """
        logits_TE = self.gate(inp.reshape(-1, inp.shape[-1]))
        expert_ids_TK = logits_TE.topk(self.top_k, dim=1).indices
        weights_TK = self.weights(logits_TE, expert_ids_TK)
        self.set_loss(torch.zeros(1, device=inp.device, requires_grad=True))
        return (expert_ids_TK, weights_TK, logits_TE) if return_all_scores else (expert_ids_TK, weights_TK)

    def weights(self, logits_TE: Tensor, expert_ids_TK: Tensor) -> Tensor:
        """The weights of the chosen experts, `(T, K)`."""
        if self.top_k == 1 and not self.top1_weight_one:
            return logits_TE.softmax(dim=1).gather(1, expert_ids_TK)
        return logits_TE.gather(1, expert_ids_TK).softmax(dim=1)
