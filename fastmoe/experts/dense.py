"""Experts that every token goes through: all tokens in, the outputs of all experts out."""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastmoe import kernels
from fastmoe._errors import check_int
from fastmoe.experts.mlp import ActivationLike, check_activation, is_gated
from fastmoe.experts.reset import reset_where_possible


class DenseExperts(nn.Module):
    """E experts `w2 act(w1 x + b1) + b2` on every token: one matrix product for all first layers, a batched one for
    all second layers.

    Args:
        num_experts, d_in, d_hidden, d_out: E, D, H, O.
        activation, bias: as of `MLPExperts`.

    Parameters:
        w1 `(E, H, D)`, gated `(E, 2H, D)`, gate half first; b1 `(E, H)`, gated `(E, 2H)`; w2 `(E, O, H)`; b2 `(E, O)`.
        Each expert starts as two `nn.Linear` would: uniform within 1/sqrt(fan_in).
    """

    def __init__(
        self,
        num_experts: int,
        d_in: int,
        d_hidden: int,
        d_out: int,
        *,
        activation: ActivationLike = "relu",
        bias: bool = True,
    ) -> None:
        super().__init__()
        self.num_experts, self.d_in = num_experts, d_in
        self.d_hidden, self.d_out = check_int("d_hidden", d_hidden, 1), check_int("d_out", d_out, 1)
        self.activation = check_activation(activation)
        width = d_hidden * (1 + is_gated(activation))
        self.w1 = nn.Parameter(torch.empty(num_experts, width, d_in))
        self.w2 = nn.Parameter(torch.empty(num_experts, d_out, d_hidden))
        self.b1 = nn.Parameter(torch.empty(num_experts, width)) if bias else None
        self.b2 = nn.Parameter(torch.empty(num_experts, d_out)) if bias else None
        self._reset_matrices()

    def reset_parameters(self) -> None:
        """Initialise each expert as `nn.Linear` does, and a module given as activation as it does itself."""
        self._reset_matrices()
        reset_where_possible(self.activation)

    @torch.no_grad()
    def _reset_matrices(self) -> None:
        for weight, bias in ((self.w1, self.b1), (self.w2, self.b2)):
            bound = 1 / math.sqrt(weight.shape[-1])
            weight.uniform_(-bound, bound)
            if bias is not None:
                bias.uniform_(-bound, bound)

    def forward(self, x_TD: Tensor) -> Tensor:
        """What every expert makes of every token: `(T, E, O)`."""
        w1_MD, b1_M = self.w1.flatten(0, 1), None if self.b1 is None else self.b1.flatten()
        pre_NH = F.linear(x_TD, w1_MD, b1_M).reshape(len(x_TD) * self.num_experts, self.w1.shape[1])
        hidden_NH = (
            kernels.activate(self.activation, pre_NH) if isinstance(self.activation, str) else self.activation(pre_NH)
        )
        hidden_ETH = hidden_NH.view(len(x_TD), self.num_experts, self.d_hidden).transpose(0, 1)
        w2_EHO = self.w2.transpose(1, 2)
        if self.b2 is None:
            return torch.bmm(hidden_ETH, w2_EHO).transpose(0, 1)
        return torch.baddbmm(self.b2.unsqueeze(1), hidden_ETH, w2_EHO).transpose(0, 1)

    def extra_repr(self) -> str:
        return (
            f"num_experts={self.num_experts}, d_in={self.d_in}, d_hidden={self.d_hidden}, d_out={self.d_out}, "
            f"activation={self.activation if isinstance(self.activation, str) else 'custom'}, "
            f"bias={self.b1 is not None}"
        )


class DenseModules(nn.Module):
    """Modules of one's own as experts on every token; expert e is `modules_list[e]`, called once with all tokens.

    Args:
        modules: E modules, each `(T, d_in) -> (T, d_out)`, with one d_out for all.
    """

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        super().__init__()
        self.modules_list = nn.ModuleList(modules)

    def reset_parameters(self) -> None:
        """Initialise every expert anew where it can: each part that has `reset_parameters`."""
        reset_where_possible(self.modules_list)

    def forward(self, x_TD: Tensor) -> Tensor:
        """What every expert makes of every token: `(T, E, d_out)`.

        Raises:
            ValueError: an expert returns another number of rows, or another width than the others.
        """
        outputs: list[Tensor] = []
        for e, module in enumerate(self.modules_list):
            out_TO = module(x_TD.clone())  # an expert may work in place, and its neighbours share the tokens
            _check_output(e, out_TO, x_TD, outputs)
            outputs.append(out_TO)
        return torch.stack(outputs, dim=1)


def _check_output(e: int, out_TO: object, x_TD: Tensor, before: list[Tensor]) -> None:
    if not isinstance(out_TO, Tensor) or out_TO.dim() != 2 or len(out_TO) != len(x_TD):
        got = tuple(out_TO.shape) if isinstance(out_TO, Tensor) else type(out_TO).__name__
        raise ValueError(f"expert {e} was given {tuple(x_TD.shape)} and must return ({len(x_TD)}, d_out), got {got}")
    if before and out_TO.shape[1] != before[0].shape[1]:
        raise ValueError(
            f"all experts must return the same width: expert {e} returned {out_TO.shape[1]}, "
            f"those before it {before[0].shape[1]}"
        )
