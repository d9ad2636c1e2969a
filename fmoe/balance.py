"""How evenly gates load the experts, layer by layer: a profile that a `gate_hook` fills in each pass.

profile = {}
reset_balance_profile(profile, num_layers, "gshard")
layer.gate_hook = lambda ids, weights, context: update_balance_profile(
    profile, ids, weights, context, layer_idx, num_expert, "gshard"
)
"""

from typing import Any

import torch
from torch import Tensor


def coefficient_variation(c_e: Tensor) -> Tensor:
    """Standard deviation over mean; 0 for an even load."""
    return c_e.std() / c_e.mean()


def lmax_over_lmin(c_e: Tensor) -> Tensor:
    """Largest over smallest load, 1 added to both; 1 for an even load."""
    return (c_e.max() + 1) / (c_e.min() + 1)


def lmax_over_lmean(c_e: Tensor) -> Tensor:
    """Largest over mean load; 1 for an even load."""
    return c_e.max() / c_e.mean()


metrics = {
    "coefficient-variation": coefficient_variation,
    "Lmax-over-Lmin": lmax_over_lmin,
    "Lmax-over-Lmean": lmax_over_lmean,
}


def reset_balance_profile(balance_dict: dict[str, list[Any]], num_layers: int, balance_strategy: str | None) -> None:
    """Make `balance_dict` a profile without values: None for each layer.

    Args:
        balance_dict: gets a list by the name of each of `metrics`, and `<balance_strategy>_loss` if there is one.
        num_layers: how many layers.
        balance_strategy: the gate's name.
    """
    for key in [*metrics, *([f"{balance_strategy}_loss"] if balance_strategy else [])]:
        balance_dict[key] = [None] * num_layers


def update_balance_profile(
    balance_dict: dict[str, list[Any]],
    gate_top_k_idx: Tensor,
    _gate_score_top_k: Tensor,
    gate_context: Any,
    layer_idx: int,
    num_expert: int,
    balance_strategy: str | None,
) -> None:
    """Enter one pass of a layer: each of `metrics` of its experts' loads, scalars on the device of the choices.

    The load of an expert is how many choices of this process it gets, dropped ones (-1) left out.

    Args:
        balance_dict: of `reset_balance_profile`.
        gate_top_k_idx: int64, chosen experts, of any shape.
        _gate_score_top_k: not looked at.
        gate_context: the layer's balance loss, entered as `<balance_strategy>_loss`; `FMoE` gives its hook None, which
            enters none.
        layer_idx: which layer.
        num_expert: E, experts in all workers together.
        balance_strategy: as given to `reset_balance_profile`.

    Raises:
        ValueError: the profile has no such layer.
    """
    found = {key: metric(_loads(gate_top_k_idx, num_expert)) for key, metric in metrics.items()}
    if balance_strategy and gate_context is not None:
        found[f"{balance_strategy}_loss"] = gate_context
    for key, value in found.items():
        num_layers = len(balance_dict.get(key, ()))
        if not 0 <= layer_idx < num_layers:
            raise ValueError(
                f"layer_idx must be below {num_layers}, the layers that reset_balance_profile made room for in "
                f"{key!r}, got {layer_idx}"
            )
        balance_dict[key][layer_idx] = value


def _loads(expert_ids: Tensor, num_expert: int) -> Tensor:
    ids_N = expert_ids.reshape(-1)
    loads_E = torch.zeros(num_expert, device=ids_N.device)
    return loads_E.scatter_add_(0, ids_N.clamp(min=0), (ids_N >= 0).to(loads_E.dtype))
