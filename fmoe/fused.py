"""All experts of an `FMoETransformerMLP` in one call of the fused kernel."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastmoe import kernels
from fmoe.linear import FMoELinear

# The experts' weights are copied side by side in each pass. On a CPU that pays in training, 1.1 to 6 times as fast as
# expert by expert, but not with fewer rows, and not without a backward pass: 64 tokens in evaluation, 8 experts of
# 512 x 2048, took 2.5 times as long.
MIN_ROWS_PER_EXPERT = 4

FUNCTIONS: dict[Callable[..., Tensor], str] = {F.gelu: "gelu", F.relu: "relu", torch.relu: "relu", F.silu: "silu"}
MODULES: dict[type[nn.Module], str] = {nn.ReLU: "relu", nn.SiLU: "silu"}


def activation_name(activation: Any) -> str | None:
    """What the kernel calls an activation; None if it does not know it."""
    if type(activation) is nn.GELU:
        return "gelu_tanh" if activation.approximate == "tanh" else "gelu"
    if isinstance(activation, nn.Module):
        return MODULES.get(type(activation))
    return next((name for function, name in FUNCTIONS.items() if activation is function), None)


def pays(num_rows: int, num_experts: int) -> bool:
    """Whether one call for all experts saves time, the copy of their weights included."""
    return torch.is_grad_enabled() and num_rows >= MIN_ROWS_PER_EXPERT * num_experts


def untouched(module: nn.Module) -> bool:
    """Whether calling each part of a module is its class's `forward` alone: no hooks, no `forward` of its own."""
    return not any(
        part._forward_hooks
        or part._forward_pre_hooks
        or part._backward_hooks
        or part._backward_pre_hooks
        or "forward" in part.__dict__
        for part in module.modules()
    )


def fit_together(up: Sequence[nn.Module], down: Sequence[nn.Module]) -> bool:
    """Whether these are linear layers of one expert each, from D to H and from H to D, with biases."""
    sizes = set()
    for linears in (up, down):
        for one in linears:
            if type(one) is not FMoELinear or one.bias is None:
                return False
            weight_OI = one.weight[0] if linears is up else one.weight[0].T
            sizes.add((len(one.weight), weight_OI.shape, weight_OI.dtype, weight_OI.device))
    return len(sizes) == 1 and sizes.pop()[0] == 1


def fused_mlp(
    up: Sequence[FMoELinear], down: Sequence[FMoELinear], activation: str, rows_RD: Tensor, counts_e: Tensor
) -> Tensor:
    """`down(activation(up(rows)))`, `(R, D)`, of each expert's linear layers and rows.

    Args:
        up, down: those of each expert, which `fit_together`.
        activation: of `activation_name`.
        rows_RD: grouped by expert.
        counts_e: how many rows each expert has.
    """
    w1, b1, w2, b2 = (
        torch.cat([getattr(one, name) for one in linears]) for linears in (up, down) for name in ("weight", "bias")
    )
    rows_RD = rows_RD.to(w1.dtype)
    places_R = torch.arange(len(rows_RD), device=rows_RD.device)
    weights_R = torch.ones_like(places_R, dtype=kernels.accumulation_dtype(w1.dtype))
    plan = kernels.Plan(places_R, counts_e.cumsum(0).to(rows_RD.device, torch.int32))
    return kernels.expert_mlp(
        rows_RD, places_R, weights_R, plan, w1, b1, w2, b2, activation=activation, rows_per_token=1
    )
