"""The model that is checked when none is given: every kind of experts, two routers, all balance losses."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastmoe
from fastmoe.check.problem import Answer

D = 8
TOKENS = 6


class Demo(nn.Module):
    """Residual MoE layers between two linear ones."""

    def __init__(self, num_experts: int, module_experts: bool) -> None:
        super().__init__()
        capacity, z_loss = {"capacity_factor": 1.0, "jitter": 0.0}, {"z_loss_weight": 0.01}
        self.first, self.last = nn.Linear(D, D), nn.Linear(D, D)
        self.stacked = fastmoe.MoE(D, num_experts, 2, d_hidden=16, router_options=z_loss)
        self.gated = fastmoe.MoE(D, num_experts, 2, d_hidden=16, activation="swiglu", shared_d_hidden=8)
        self.limited = fastmoe.MoE(D, num_experts, 1, d_hidden=16, router="switch", router_options=capacity)
        self.modules_too: nn.Module | None = None
        if module_experts:
            self.modules_too = fastmoe.MoE(D, num_experts, min(2, num_experts), expert=_expert)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for layer in (self.stacked, self.gated, self.limited, self.modules_too):
            if layer is not None:
                x = x + layer(torch.tanh(x))
        return x + self.last(x)


def _expert() -> nn.Module:
    return nn.Sequential(nn.Linear(D, 5), nn.Tanh(), nn.Linear(5, D))


def demo(num_experts: int = 5, sequences: int = 24, module_experts: bool = True) -> Answer:
    """A factory for `check_layout`; experts that are modules can be left out, as tp="hidden" cannot split them."""
    model = Demo(num_experts, module_experts)
    batch = torch.randn(sequences, TOKENS, D), torch.randn(sequences, TOKENS, D)
    return model, batch, _loss


def _loss(output: Tensor, x: Tensor, target: Tensor) -> Tensor:
    return F.mse_loss(output, target)
