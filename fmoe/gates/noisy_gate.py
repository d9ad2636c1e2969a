"""`NoisyGate`: learned noise on the logits in training."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastmoe.routers import noise
from fastmoe.routers.noisy_topk import chance_of_choice
from fmoe.gates.base_gate import BaseGate


class NoisyGate(BaseGate):
    """Logits `x @ w_gate + N(0, 1) * (softplus(x @ w_noise) + 0.01)`, the noise in training only; the K best.

    Noisy top-k gating (Shazeer et al. 2017, 1701.06538). Weights as of `NaiveGate`. The loss is the squared coefficient
    of variation (with the sample variance, as in FastMoE) of each expert's sum of weights, plus that of its expected
    number of tokens under new noise; in evaluation of its number of tokens.

    Args:
        d_model, num_expert, world_size, top_k, top1_weight_one: see `NaiveGate`.

    Attributes:
        w_gate, w_noise: `(D, E)`.

    Raises:
        ValueError: more experts chosen than there are.
    """

    noise_epsilon = 1e-2

    def __init__(
        self, d_model: int, num_expert: int, world_size: int, top_k: int = 2, top1_weight_one: bool = False
    ) -> None:
        super().__init__(num_expert, world_size)
        if not 1 <= top_k <= self.tot_expert:
            raise ValueError(f"top_k must be from 1 to the number of experts, {self.tot_expert}, got {top_k}")
        self.w_gate = nn.Parameter(torch.empty(d_model, self.tot_expert))
        self.w_noise = nn.Parameter(torch.empty(d_model, self.tot_expert))
        self.top_k, self.top1_weight_one = top_k, top1_weight_one
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise anew, as after construction: both as an `nn.Linear` of D inputs."""
        for weight_DE in (self.w_gate, self.w_noise):
            nn.init.kaiming_uniform_(weight_DE.T, a=5**0.5)

    def forward(self, inp: Tensor) -> tuple[Tensor, Tensor]:
        """The chosen experts, best first, and their weights, both `(T, K)`."""
        clean_TE = inp @ self.w_gate
        noisy_TE, std_TE = clean_TE, None
        if self.training:
            std_TE = F.softplus(inp @ self.w_noise) + self.noise_epsilon
            noisy_TE = clean_TE + noise.normal(clean_TE) * std_TE
        top_TK, expert_ids_TK = noisy_TE.topk(self.top_k, dim=1)
        if self.top_k == 1 and not self.top1_weight_one:
            weights_TK = noisy_TE.softmax(dim=1).gather(1, expert_ids_TK)
        else:
            weights_TK = top_TK.softmax(dim=1)
        shares_TE = torch.zeros_like(noisy_TE).scatter(1, expert_ids_TK, weights_TK)
        chances_TE = (shares_TE > 0).to(noisy_TE.dtype)
        if std_TE is not None:
            chances_TE = chance_of_choice(clean_TE, noisy_TE, std_TE, self.top_k)
        self.set_loss(self._imbalance(shares_TE) + self._imbalance(chances_TE))
        return expert_ids_TK, weights_TK

    def _imbalance(self, load_TE: Tensor) -> Tensor:
        load_E = self.sharers().sum_for_loss(load_TE.sum(0))
        if self.tot_expert == 1:
            return load_E.sum() * 0
        return load_E.var() / (load_E.mean().square() + 1e-10)
