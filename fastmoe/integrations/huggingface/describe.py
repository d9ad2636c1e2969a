"""A MoE layer as plain data, for `config.json`, and back."""

import json
from typing import Any

import torch
from torch import nn
from transformers.activations import ACT2FN

from fastmoe.convert import Absorbed, DropoutMoE, absorbed_beside
from fastmoe.experts import MLPExperts
from fastmoe.kernels import ACTIVATIONS
from fastmoe.layer import MoE
from fastmoe.routers import ROUTERS, Router, option_names

PLAIN = ("d_model", "num_experts", "top_k", "d_hidden", "bias", "dropout", "shared_d_hidden", "backend")


def describe(model: nn.Module) -> list[dict[str, Any]]:
    """The MoE layers of `model`, those alike in one entry: their names, and what `build` makes them of.

    Raises:
        ValueError: a layer that plain data cannot describe; the message says which and why.
    """
    groups: dict[str, dict[str, Any]] = {}
    for name, layer in model.named_modules():
        if isinstance(layer, MoE):
            parent, _, child = name.rpartition(".")
            absorbed = absorbed_beside(model.get_submodule(parent), child)
            entry = _describe(name, layer) | {"absorbed": list(absorbed)}
            groups.setdefault(json.dumps(entry, sort_keys=True), entry | {"names": []})["names"].append(name)
    return list(groups.values())


def build(model: nn.Module, groups: list[dict[str, Any]]) -> list[MoE]:
    """Put the described layers into a dense `model`, in place; names that this model has not are left out.

    Raises:
        ValueError: the model has none of them.
    """
    built = []
    for group in groups:
        for name in group["names"]:
            if not _has(model, name):
                continue
            layer = _make(group)
            model.set_submodule(name, layer)
            for other in group["absorbed"]:
                model.set_submodule(_beside(name, other), Absorbed())
            built.append(layer)
    if groups and not built:
        raise ValueError(
            f"{type(model).__name__} has none of the MoE layers of its config, as {groups[0]['names'][0]!r}"
        )
    return built


def _describe(name: str, layer: MoE) -> dict[str, Any]:
    experts, router = layer.experts, layer.router
    kind = next((known for known, cls in ROUTERS.items() if cls is type(router)), None)
    if not isinstance(experts, MLPExperts):
        raise ValueError(f"layer {name!r} has experts of its own, which a config cannot describe")
    if kind is None or not isinstance(router, Router):
        raise ValueError(f"layer {name!r} has a router of its own ({type(router).__name__}), which is under no name")
    if type(layer) not in (MoE, DropoutMoE):
        raise ValueError(f"layer {name!r} is a {type(layer).__name__}, not a fastmoe.MoE")
    entry = {
        "d_model": layer.d_model,
        "num_experts": layer.num_experts,
        "top_k": layer.top_k,
        "d_hidden": experts.d_hidden,
        "activation": _activation_name(name, experts.activation),
        "bias": experts.b1 is not None,
        "dropout": experts.dropout,
        "shared_d_hidden": 0 if layer.shared is None else layer.shared.w2.in_features,
        "backend": layer.backend,
        "router": kind,
        "router_options": {option: getattr(router, option) for option in option_names(type(router))},
        "output_dropout": layer.output_dropout.p if isinstance(layer, DropoutMoE) else None,
    }
    try:
        json.dumps(entry)
    except TypeError as error:
        raise ValueError(f"layer {name!r} has an option that JSON cannot hold: {error}") from None
    return entry


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
    x = torch.linspace(-8, 8, 1001, dtype=torch.float64)
    with torch.no_grad():
        y = activation(x)
        for known in ("relu2", *ACT2FN):
            candidate = ACT2FN[known]
            if next(candidate.parameters(), None) is None and torch.equal(candidate(x), y):
                return known
    return None


def _beside(name: str, other: str) -> str:
    parent = name.rpartition(".")[0]
    return f"{parent}.{other}" if parent else other


def _has(model: nn.Module, name: str) -> bool:
    try:
        model.get_submodule(name)
    except AttributeError:
        return False
    return True


def _make(entry: dict[str, Any]) -> MoE:
    activation = entry["activation"]
    options = {key: entry[key] for key in PLAIN} | {
        "router": entry["router"],
        "router_options": entry["router_options"],
    }
    options["activation"] = activation if activation in ACTIVATIONS else ACT2FN[activation]
    d_model, num_experts, top_k = (options.pop(key) for key in ("d_model", "num_experts", "top_k"))
    if entry["output_dropout"] is None:
        return MoE(d_model, num_experts, top_k, **options)
    return DropoutMoE(d_model, num_experts, top_k, output_dropout=nn.Dropout(entry["output_dropout"]), **options)
