"""The routers of DeepSeek-V3 as Megatron has them: its own training loop moves the bias, and saves none that rests."""

from typing import Any

import torch
from torch import Tensor

from fastmoe.routers.loss_free import LossFreeRouter


class ExpertBiasRouter(LossFreeRouter):
    """`LossFreeRouter` under the names by which Megatron finds it, where `moe_router_enable_expert_bias` is set."""

    @property
    def expert_bias(self) -> Tensor:
        """float32 `(E,)`; Megatron moves it by `moe_router_bias_update_rate` once per step."""
        return self.bias_E

    @property
    def local_tokens_per_expert(self) -> Tensor:
        """int64 `(E,)`: rows of each expert since the last update, which Megatron sums over processes and zeroes."""
        return self._load_E

    def _stepped(self, optimizer: torch.optim.Optimizer) -> None:
        """Nothing: Megatron's optimizers may hold copies of the parameters, and it has updated the bias before."""


class SequenceLossRouter(LossFreeRouter):
    """`LossFreeRouter` for the loss within each sequence alone; its bias stays 0 and is in no checkpoint."""

    def __init__(self, d_model: int, num_experts: int, top_k: int = 2, **options: Any) -> None:
        super().__init__(d_model, num_experts, top_k, bias_update_rate=0.0, **options)
        self.register_buffer("bias_E", self.bias_E, persistent=False)
