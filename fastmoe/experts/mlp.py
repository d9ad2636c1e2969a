"""Built-in experts: two stacked matrices with an activation between, plain or gated."""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastmoe import kernels
from fastmoe._errors import check_int
from fastmoe._processes import ScaleGradient
from fastmoe.experts.base import Experts, local
from fastmoe.experts.reset import reset_where_possible
from fastmoe.kernels import Plan

ActivationLike = str | Callable[[Tensor], Tensor]


class MLPExperts(Experts):
    """E experts `w2 act(w1 x + b1) + b2`; gated: `w2 (act(g) * u) + b2` with `[g; u] = w1 x + b1`.

    Args:
        num_experts, d_model, d_hidden: E, D, H.
        activation: relu, gelu, gelu_tanh, silu; gated: swiglu, geglu, geglu_tanh, reglu; or a callable `(rows, H) ->
            (rows, H)`. A module given as activation is shared by all experts, and its parameters belong to this module.
        bias: whether `b1` and `b2` are there.
        dropout: probability, on the hidden activations, in training.

    Parameters:
        w1 `(E, H, D)`, gated `(E, 2H, D)`, gate half first; b1 `(E, H)`, gated `(E, 2H)`; w2 `(E, D, H)`; b2 `(E, D)`.
        Each expert starts as two `nn.Linear` would: uniform within 1/sqrt(fan_in).
    """

    def __init__(
        self,
        num_experts: int,
        d_model: int,
        d_hidden: int,
        *,
        activation: ActivationLike = "gelu",
        bias: bool = True,
        dropout: float = 0.0,
        backend: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(num_experts, backend)
        self.d_model = d_model
        self.d_hidden = check_int("d_hidden", d_hidden, 1)
        self.activation = check_activation(activation)
        self.dropout = check_dropout(dropout)
        width = d_hidden * (1 + is_gated(activation))

        def empty(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(shape, device=device, dtype=dtype))

        self.w1 = empty(num_experts, width, d_model)
        self.w2 = empty(num_experts, d_model, d_hidden)
        self.b1 = empty(num_experts, width) if bias else None
        self.b2 = empty(num_experts, d_model) if bias else None
        self._reset_matrices()

    def reset_parameters(self) -> None:
        """Initialise each expert as `nn.Linear` does, and a module given as activation as it does itself."""
        self._reset_matrices()
        reset_where_possible(self.activation)

    @torch.no_grad()
    def _reset_matrices(self) -> None:
        for name, parameter in self.named_parameters(recurse=False):
            parameter.uniform_(-self.bound(name), self.bound(name))

    def bound(self, name: str) -> float:
        """The largest absolute value that a parameter starts with: `1 / sqrt(fan_in)`."""
        return 1 / math.sqrt(self.d_model if name in ("w1", "b1") else self.d_hidden)

    @property
    def fused(self) -> bool:
        """Whether one kernel call computes the whole routed MLP."""
        return isinstance(self.activation, str) and not (self.training and self.dropout)

    def cast(self, x_TD: Tensor) -> Tensor:
        """Under autocast, in its dtype."""
        device = x_TD.device.type
        if x_TD.dtype == torch.float64 or not torch.amp.is_autocast_available(device):
            return x_TD
        return x_TD.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else x_TD

    def mix_here(self, x_TD: Tensor, token_ids_N: Tensor, weights_N: Tensor, plan: Plan, rows_per_token: int) -> Tensor:
        if not self.fused:
            return super().mix_here(x_TD, token_ids_N, weights_N, plan, rows_per_token)
        assert isinstance(self.activation, str)
        w1, b1, w2, b2 = self.matrices()
        return kernels.expert_mlp(
            x_TD,
            token_ids_N,
            weights_N,
            plan,
            w1,
            b1,
            w2,
            b2,
            activation=self.activation,
            rows_per_token=rows_per_token,
            backend=self.backend,
        )

    def matrices(self) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
        """w1, b1, w2, b2 of the experts here, as plain tensors; of `b2` this process's share of the sum."""
        w1, b1, w2, b2 = (None if p is None else local(p) for p in (self.w1, self.b1, self.w2, self.b2))
        assert w1 is not None
        assert w2 is not None
        if b2 is not None and self.tp.size > 1:
            b2 = ScaleGradient.apply(b2, float(self.tp.size)) / self.tp.size
        return w1, b1, w2, b2

    def compute(self, rows_ND: Tensor, offsets_E: Tensor) -> Tensor:
        """Rows sorted by expert in, rows out, `(N, D)`; rows past the last offset give zeros."""
        w1, b1, w2, b2 = self.matrices()
        pre_NH = kernels.grouped_mm(rows_ND, w1, offsets_E, b1, backend=self.backend)
        hidden_NH = F.dropout(self._activate(pre_NH), self.dropout, self.training)
        return kernels.grouped_mm(hidden_NH, w2, offsets_E, b2, backend=self.backend)

    def _activate(self, pre_NH: Tensor) -> Tensor:
        if isinstance(self.activation, str):
            return kernels.activate(self.activation, pre_NH)
        if self.spread_over == 1:
            return self.activation(pre_NH)
        # Gradients here are of the mean over the processes, for the experts. A module given as activation has replicas,
        # of whose gradients the mean is taken anyway.
        pre_NH = ScaleGradient.apply(pre_NH, 1 / self.spread_over)
        return ScaleGradient.apply(self.activation(pre_NH), float(self.spread_over))

    def parameters_per_expert(self) -> list[int]:
        """How many parameters each expert has."""
        stacked = [p for p in (self.w1, self.b1, self.w2, self.b2) if p is not None]
        split = self.tp.size
        sizes = (math.prod(p.shape[1:]) * (1 if p is self.b2 else split) for p in stacked)
        return [sum(sizes)] * self.num_experts

    def total_parameters(self) -> int:
        """How many parameters all E experts have together, and a module given as activation."""
        own = set(self.parameters(recurse=False))
        return sum(self.parameters_per_expert()) + sum(p.numel() for p in self.parameters() if p not in own)

    def extra_repr(self) -> str:
        return (
            f"num_experts={self.num_experts}, d_model={self.d_model}, d_hidden={self.d_hidden}, "
            f"activation={self.activation if isinstance(self.activation, str) else 'custom'}, "
            f"bias={self.b1 is not None}, dropout={self.dropout}"
        )


def is_gated(activation: ActivationLike) -> bool:
    """Whether the first matrix has a gate half."""
    return isinstance(activation, str) and kernels.get_activation(activation).gated


def check_activation(activation: ActivationLike) -> ActivationLike:
    """`activation` if it is a known name or a callable, else a `ValueError`."""
    if isinstance(activation, str):
        kernels.get_activation(activation)
    elif not callable(activation):
        raise ValueError(f"activation must be a name or a callable, got {activation!r}")
    return activation


def check_dropout(dropout: float) -> float:
    """`dropout` if it is a probability, else a `ValueError`."""
    if isinstance(dropout, bool) or not isinstance(dropout, (int, float)) or not 0 <= dropout <= 1:
        raise ValueError(f"dropout must be a number from 0 to 1, got {dropout!r}")
    return float(dropout)
