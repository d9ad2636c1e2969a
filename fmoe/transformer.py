"""`FMoETransformerMLP`: the feed-forward block of a Transformer, as an MoE."""

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from fmoe.fused import activation_name, fit_together, fused_mlp, pays, untouched
from fmoe.layers import FMoE
from fmoe.linear import FMoELinear

Activation = Callable[[Tensor], Tensor]


class _Expert(nn.Module):
    """`h4toh(activation(htoh4(rows)))` for `num_expert` experts at once.

    Args:
        num_expert: e, experts in this worker.
        d_model, d_hidden: D, H.
        activation: a module or a callable.
        rank: kept by the two linear layers.
    """

    def __init__(self, num_expert: int, d_model: int, d_hidden: int, activation: Activation, rank: int = 0) -> None:
        super().__init__()
        self.htoh4 = FMoELinear(num_expert, d_model, d_hidden, bias=True, rank=rank)
        self.h4toh = FMoELinear(num_expert, d_hidden, d_model, bias=True, rank=rank)
        self.activation = activation

    def forward(self, inp: Tensor, fwd_expert_count: Tensor | Sequence[int]) -> Tensor:
        """`(R, D)` for `inp` `(R, D)`, grouped by expert; see `FMoELinear.forward`."""
        hidden_RH = self.activation(self.htoh4(inp, fwd_expert_count))
        return self.h4toh(hidden_RH, fwd_expert_count)


class FMoETransformerMLP(FMoE):
    """Two linear layers with an activation between them, per expert; parameters `experts.{e}.htoh4` and `.h4toh`.

    Args:
        num_expert: experts in this worker.
        d_model, d_hidden: D, H.
        activation: a module or a callable; `nn.GELU()` if None.
        expert_dp_comm: see `FMoE.mark_parallel_comm`.
        expert_rank: kept by the experts' linear layers.
        kwargs: of `FMoE`.
    """

    def __init__(
        self,
        num_expert: int = 32,
        d_model: int = 1024,
        d_hidden: int = 4096,
        activation: Activation | None = None,
        expert_dp_comm: str = "none",
        expert_rank: int = 0,
        **kwargs: Any,
    ) -> None:
        between = nn.GELU() if activation is None else activation

        def one_expert(d_model: int) -> _Expert:
            return _Expert(1, d_model, d_hidden, between, rank=expert_rank)

        super().__init__(num_expert=num_expert, d_model=d_model, expert=one_expert, **kwargs)
        self.mark_parallel_comm(expert_dp_comm)

    def forward(self, inp: Tensor) -> Tensor:
        """`(..., D)` for `inp` `(..., D)`; leading dimensions are free.

        Raises:
            ValueError: another width.
        """
        if inp.dim() == 0 or inp.shape[-1] != self.d_model:
            raise ValueError(f"inp must be (..., {self.d_model}), got {tuple(inp.shape)}")
        return super().forward(inp.reshape(-1, self.d_model)).reshape(inp.shape)

    def expert_fn(self, inp: Any, fwd_expert_count: Tensor) -> Any:
        """As of `FMoE`: in training one call for all experts, where they are as this class built them."""
        experts: list[Any] = list(self.experts.children())
        if not pays(len(inp), len(experts)) or not all(type(one) is _Expert for one in experts):
            return super().expert_fn(inp, fwd_expert_count)
        up, down = [one.htoh4 for one in experts], [one.h4toh for one in experts]
        names = {activation_name(one.activation) for one in experts}
        activation = names.pop() if len(names) == 1 else None
        if activation is None or not fit_together(up, down) or not all(map(untouched, experts)):
            return super().expert_fn(inp, fwd_expert_count)
        return fused_mlp(up, down, activation, inp, fwd_expert_count)
