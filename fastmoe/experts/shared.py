"""The shared expert: an MLP that every token goes through, beside the routed ones."""

import torch.nn.functional as F
from torch import Tensor, nn

from fastmoe import kernels
from fastmoe.experts.mlp import ActivationLike, check_dropout, is_gated
from fastmoe.experts.reset import reset_where_possible


class SharedExpert(nn.Module):
    """One MLP of the experts' kind (DeepSeekMoE, Dai et al. 2024, 2401.06066, section 3.2).

    Args: as of `MLPExperts`.

    Submodules:
        w1, `nn.Linear` from D to H, gated to 2H, gate half first; w2, `nn.Linear` from H to D.
    """

    def __init__(
        self,
        d_model: int,
        d_hidden: int,
        *,
        activation: ActivationLike = "gelu",
        bias: bool = True,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.activation, self.dropout = activation, check_dropout(dropout)
        self.w1 = nn.Linear(d_model, d_hidden * (1 + is_gated(activation)), bias=bias)
        self.w2 = nn.Linear(d_hidden, d_model, bias=bias)

    def reset_parameters(self) -> None:
        """Initialise both matrices as `nn.Linear` does, and a module given as activation as it does itself."""
        for part in (self.w1, self.w2, self.activation):
            reset_where_possible(part)

    def forward(self, x_TD: Tensor) -> Tensor:
        pre_TH = self.w1(x_TD)
        hidden_TH = (
            kernels.activate(self.activation, pre_TH) if isinstance(self.activation, str) else self.activation(pre_TH)
        )
        return self.w2(F.dropout(hidden_TH, self.dropout, self.training))
