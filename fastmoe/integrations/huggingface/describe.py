"""A MoE layer as plain data, for `config.json`, and back."""

import json
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.activations import ACT2FN

from fastmoe.convert import Absorbed, DropoutMoE, absorbed_beside
from fastmoe.experts import MLPExperts
from fastmoe.kernels import ACTIVATIONS
from fastmoe.layer import MoE
from fastmoe.model import moe_layers
from fastmoe.routers import ROUTERS, Router, option_names

SIZES = ("d_model", "num_experts", "top_k", "d_hidden", "bias", "dropout", "shared_d_hidden", "backend")
OPTIONS = (*SIZES, "router", "router_options")


def describe(model: PreTrainedModel) -> list[dict[str, Any]]:
    """The MoE layers of `model`, those alike in one entry: their names, and what `build` makes them of.

    Names are those in the base model, which other heads have too, or in the head (`of_base` False).

    Raises:
        ValueError: a layer that plain data cannot describe; the message says which and why.
    """
    groups: dict[str, dict[str, Any]] = {}
    prefix = "" if model.base_model is model else f"{model.base_model_prefix}."
    for name, layer in moe_layers(model).items():
        parent, _, child = name.rpartition(".")
        entry = _describe(name, layer) | {
            "absorbed": list(absorbed_beside(model.get_submodule(parent), child)),
            "of_base": name.startswith(prefix),
        }
        group = groups.setdefault(json.dumps(entry, sort_keys=True), entry | {"names": []})
        group["names"].append(name.removeprefix(prefix))
    return list(groups.values())


def build(model: PreTrainedModel, groups: list[dict[str, Any]]) -> list[MoE]:
    """Put the described layers into a dense `model`, in place; those of other heads are left out.

    Raises:
        ValueError: the model has none of them.
    """
    built = []
    for group in groups:
        root = model.base_model if group["of_base"] else model
        found = dict(root.named_modules())
        for name in group["names"]:
            if name in found and not isinstance(found[name], MoE):
                built.append(_make(group))
                root.set_submodule(name, built[-1])
                for other in group["absorbed"]:
                    root.set_submodule(f"{name.rpartition('.')[0]}.{other}", Absorbed())
    if not moe_layers(model):
        raise ValueError(f"{type(model).__name__} has none of the MoE layers that its config describes")
    return built


def _describe(name: str, layer: MoE) -> dict[str, Any]:
    experts, router = layer.experts, layer.router
    kind = next((known for known, cls in ROUTERS.items() if cls is type(router)), None)
    if not isinstance(experts, MLPExperts):
        raise ValueError(f"layer {name!r} has experts of its own, which a config cannot describe")
    if kind is None or not isinstance(router, Router):
        raise ValueError(f"layer {name!r} has a router of its own ({type(router).__name__}), which is under no name")
    entry = _sizes(layer, experts) | {
        "activation": _activation_name(name, experts.activation),
        "router": kind,
        "router_options": {option: getattr(router, option) for option in option_names(type(router))},
    }
    try:
        json.dumps(entry)
    except TypeError as error:
        raise ValueError(f"layer {name!r} has an option that JSON cannot hold: {error}") from None
    return entry


def _sizes(layer: MoE, experts: MLPExperts) -> dict[str, Any]:
    return {
        "d_model": layer.d_model,
        "num_experts": layer.num_experts,
        "top_k": layer.top_k,
        "d_hidden": experts.d_hidden,
        "bias": experts.b1 is not None,
        "dropout": experts.dropout,
        "shared_d_hidden": 0 if layer.shared is None else layer.shared.w2.in_features,
        "backend": layer.backend,
        "output_dropout": layer.output_dropout.p if isinstance(layer, DropoutMoE) else None,
    }


def _activation_name(name: str, activation: Any) -> str:
    """Its name in fastmoe or in transformers' table."""
    if isinstance(activation, str):
        return activation
    known = _name_in_transformers(activation)
    if known is None:
        raise ValueError(f"layer {name!r} has an activation that is under no name: {activation!r}")
    return known


def _name_in_transformers(activation: Any) -> str | None:
    """The name of a function or module in transformers' `ACT2FN` that gives the same on [-8, 8], None without one."""
    if isinstance(activation, nn.Module) and next(activation.parameters(), None) is not None:
        return None
    x = torch.linspace(-8, 8, 1001, dtype=torch.float64, device="cpu")
    with torch.no_grad():
        y = activation(x)
        for known in ("relu2", *ACT2FN):
            candidate = ACT2FN[known]
            if next(candidate.parameters(), None) is None and torch.equal(candidate(x), y):
                return known
    return None


def _make(entry: dict[str, Any]) -> MoE:
    activation = entry["activation"]
    options = {key: entry[key] for key in OPTIONS}
    options["activation"] = activation if activation in ACTIVATIONS else ACT2FN[activation]
    if entry["output_dropout"] is None:
        return MoE(**options)
    return DropoutMoE(**options, output_dropout=nn.Dropout(entry["output_dropout"]))
