"""`summary`: how large a model is, and how much of it one token uses."""

from dataclasses import dataclass

from torch import nn

from fastmoe.layer import MoE
from fastmoe.model import moe_layers
from fastmoe.routers import SoftRouter


@dataclass(frozen=True)
class LayerSummary:
    """One MoE layer: its parameters, and those that one token uses (K average experts and all the rest)."""

    name: str
    num_experts: int
    top_k: int
    total_params: int
    active_params: int


@dataclass(frozen=True)
class Summary:
    """A whole model; prints as a table."""

    layers: tuple[LayerSummary, ...]
    total_params: int
    active_params: int

    def __str__(self) -> str:
        rows = [("layer", "experts", "top_k", "parameters", "active per token")]
        for layer in self.layers:
            name = layer.name or "(the model)"
            rows.append(
                (name, f"{layer.num_experts}", f"{layer.top_k}", f"{layer.total_params:,}", f"{layer.active_params:,}")
            )
        rows.append(("whole model", "", "", f"{self.total_params:,}", f"{self.active_params:,}"))
        widths = [max(len(row[i]) for row in rows) for i in range(5)]
        lines = ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows]
        rule = "-" * len(lines[0])
        return "\n".join([lines[0], rule, *lines[1:-1], rule, lines[-1]])


def summary(model: nn.Module) -> Summary:
    """Total and active parameters of a model and of each of its MoE layers. `print` it for a table.

    Active parameters are those that one token uses: everything outside the routed experts, and of each MoE layer
    top_k experts of average size; all of them where the router is soft. Parameters used at several places count once,
    experts that other processes hold count too.
    """
    layers = tuple(_layer_summary(name, layer) for name, layer in moe_layers(model).items())
    elsewhere = sum(_elsewhere(layer) for layer in moe_layers(model).values())
    total = sum(p.numel() for p in model.parameters()) + elsewhere
    idle = sum(layer.total_params - layer.active_params for layer in layers)
    return Summary(layers, total, total - idle)


def _layer_summary(name: str, layer: MoE) -> LayerSummary:
    total = sum(p.numel() for p in layer.parameters()) + _elsewhere(layer)
    per_expert = layer.experts.parameters_per_expert()
    used = layer.num_experts if isinstance(layer.router, SoftRouter) else layer.top_k
    idle = round(sum(per_expert) * (1 - used / layer.num_experts))
    return LayerSummary(name, layer.num_experts, used, total, total - idle)


def _elsewhere(layer: MoE) -> int:
    """How many parameters of the layer's experts are in other processes."""
    return layer.experts.total_parameters() - sum(p.numel() for p in layer.experts.parameters())
