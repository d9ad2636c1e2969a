"""`experts_implementation="fastmoe"`: the experts of transformers' MoE models, on fastmoe's kernels."""

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.activations import GELUActivation, GELUTanh, SiLUActivation
from transformers.integrations import use_experts_implementation
from transformers.integrations.moe import ExpertsInterface

from fastmoe import kernels
from fastmoe.kernels import Plan

NAME = "fastmoe"

# Which of the kernels' activations a module is, by its exact type; None if it is none of them.
_MODULES: dict[type, Callable[[Any], str | None]] = {
    nn.ReLU: lambda act_fn: "relu",
    nn.SiLU: lambda act_fn: "silu",
    SiLUActivation: lambda act_fn: "silu",
    nn.GELU: lambda act_fn: "gelu_tanh" if act_fn.approximate == "tanh" else "gelu",
    GELUActivation: lambda act_fn: "gelu" if act_fn.act is F.gelu else None,
    GELUTanh: lambda act_fn: "gelu_tanh" if isinstance(act_fn.act, functools.partial) else None,
}
_FUNCTIONS: dict[Callable, str] = {F.silu: "silu", F.gelu: "gelu", F.relu: "relu", torch.relu: "relu"}
_GATED = {"relu": "reglu", "silu": "swiglu", "gelu": "geglu", "gelu_tanh": "geglu_tanh"}


@use_experts_implementation
class _WithoutOwnGate(nn.Module):
    pass


# What transformers gives a class that defines no gate of its own: `act_fn(gate) * up`, halves one after the other.
_default_gate = _WithoutOwnGate._apply_gate  # type: ignore[attr-defined]


def register() -> None:
    """Make `"fastmoe"` an `experts_implementation` of transformers."""
    ExpertsInterface.register(NAME, experts_forward)


def experts_forward(self: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """What transformers calls as the forward of an experts module, `self`.

    One fused kernel where the module has the usual layout, gate and activation. Else two grouped products, with the
    module's own gate, activation and norm between and after them.

    Args:
        hidden_states: `(T, H)`.
        top_k_index: `(T, K)`, each token's experts; the number of experts, or -1, is no expert here: not computed.
        top_k_weights: `(T, K)`.

    Returns:
        `(T, H)` in the dtype of `hidden_states`.

    Raises:
        ValueError: on a CPU, an expert that is not there.
    """
    w1, b1, w2, b2 = _matrices(self)
    (num_tokens, top_k), num_experts = top_k_index.shape, len(w2)
    ids_N = top_k_index.reshape(-1).to(torch.int64)
    ids_N = torch.where(ids_N == num_experts, -1, ids_N)
    plan = kernels.plan(ids_N, num_experts)
    token_ids_N = torch.arange(num_tokens, device=ids_N.device).repeat_interleave(top_k)
    x_TD = hidden_states.to(w1.dtype)
    weights_N = top_k_weights.reshape(-1).to(kernels.accumulation_dtype(w1.dtype))
    activation = fused_activation(self)
    if activation is None:
        y_TD = _unfused(self, x_TD, token_ids_N, ids_N, weights_N, plan)
    else:
        y_TD = kernels.expert_mlp(
            x_TD, token_ids_N, weights_N, plan, w1, b1, w2, b2, activation=activation, rows_per_token=top_k
        )
    return y_TD.to(hidden_states.dtype)


def fused_activation(experts: nn.Module) -> str | None:
    """The activation's name in `kernels.ACTIVATIONS` if one kernel computes the whole module, else None."""
    if experts.is_transposed or getattr(experts, "has_post_expert_norm", False):
        return None
    if not experts.has_gate:
        return _activation_name(experts.act_fn)
    if not experts.is_concatenated or _has_own_gate(experts):
        return None
    name = _activation_name(experts.act_fn)
    return None if name is None else _GATED[name]


def _has_own_gate(experts: Any) -> bool:
    return type(experts)._apply_gate is not _default_gate or "_apply_gate" in experts.__dict__


def _activation_name(act_fn: Any) -> str | None:
    if isinstance(act_fn, nn.Module):
        return _MODULES[type(act_fn)](act_fn) if type(act_fn) in _MODULES else None
    return _FUNCTIONS.get(act_fn)


def _matrices(experts: Any) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
    """w1, b1, w2, b2 as views with the output dimension first, whichever way they are stored."""
    first = "gate_up_proj" if experts.has_gate else "up_proj"
    w1, w2 = getattr(experts, first), experts.down_proj
    b1, b2 = (getattr(experts, f"{first}_bias"), experts.down_proj_bias) if experts.has_bias else (None, None)
    return (w1.transpose(1, 2), b1, w2.transpose(1, 2), b2) if experts.is_transposed else (w1, b1, w2, b2)


def _unfused(experts: Any, x_TD: Tensor, token_ids_N: Tensor, ids_N: Tensor, weights_N: Tensor, plan: Plan) -> Tensor:
    w1, b1, w2, b2 = _matrices(experts)
    rows_ND = x_TD.index_select(0, token_ids_N[plan.order_N])
    pre_NH = _product(rows_ND, w1, b1, ids_N, plan)
    hidden_NH = experts._apply_gate(pre_NH) if experts.has_gate else experts.act_fn(pre_NH)
    rows_ND = _product(hidden_NH.to(pre_NH.dtype), w2, b2, ids_N, plan)
    if getattr(experts, "has_post_expert_norm", False):
        rows_ND = experts.post_expert_norm(rows_ND)
    return kernels.combine(rows_ND, token_ids_N, weights_N, plan, len(x_TD))


def _product(rows_NI: Tensor, weight_EOI: Tensor, bias_EO: Tensor | None, ids_N: Tensor, plan: Plan) -> Tensor:
    """`rows @ weight[e].T + bias[e]`; under autocast a wider bias widens the sum, as wherever PyTorch adds one."""
    device = rows_NI.device.type
    if bias_EO is None or not torch.is_autocast_enabled(device) or bias_EO.dtype == torch.get_autocast_dtype(device):
        return kernels.grouped_mm(rows_NI, weight_EOI, plan.offsets_E, bias_EO)
    return kernels.grouped_mm(rows_NI, weight_EOI, plan.offsets_E) + bias_EO[ids_N[plan.order_N].clamp(min=0)]
