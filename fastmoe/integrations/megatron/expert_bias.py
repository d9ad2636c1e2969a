"""The router of DeepSeek-V3, whose bias Megatron's own training loop updates."""

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
