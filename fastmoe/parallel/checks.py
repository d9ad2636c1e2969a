"""What `parallelize` looks at before it changes anything."""

from __future__ import annotations

import inspect
from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from fastmoe._errors import unknown_name
from fastmoe.layer import MoE
from fastmoe.model import moe_layers
from fastmoe.parallel.layout import Layout
from fastmoe.parallel.shard import expert_parameters

OURS = {"module", "mesh", "device_mesh", "process_group", "ignored_params"}


def check_options(model: nn.Module, layout: Layout, engine: str, options: Mapping[str, Any]) -> None:
    """Whether the engine knows its options, and can take the model.

    Raises:
        ValueError: it cannot; says why.
    """
    known = set(inspect.signature(_maker(engine)).parameters) - OURS
    for option in options:
        if option not in known:
            raise unknown_name(f"option of engine {engine!r}", option, known)
    if engine == "ddp":
        return
    scalars = [name for name, parameter in model.named_parameters() if parameter.dim() == 0]
    if scalars:
        raise ValueError(f"engine 'fsdp' cannot shard parameters of no dimension: {', '.join(scalars[:5])}")
    if options.get("mp_policy") is not None and layout.replicas is None:
        raise ValueError("mp_policy needs a dp dimension in the mesh; give it one of size 1")


def _maker(engine: str) -> Callable[..., Any]:
    if engine == "ddp":
        return DistributedDataParallel.__init__
    from torch.distributed.fsdp import fully_shard

    return fully_shard


def check_sharing(model: nn.Module, layout: Layout) -> None:
    """Whether each parameter of an expert belongs to one layer alone.

    Raises:
        ValueError: one is a part of another layer, or of the rest of the model, too; names it.
    """
    if layout.mesh.size() == 1:
        return
    names: dict[nn.Parameter, list[str]] = defaultdict(list)
    owners: dict[nn.Parameter, set[int]] = defaultdict(set)
    of_experts = {id(layer): set(expert_parameters(layer).values()) for layer in moe_layers(model).values()}
    for name, module in model.named_modules(remove_duplicate=False):
        for own, parameter in module.named_parameters(recurse=False):
            names[parameter].append(f"{name}.{own}".lstrip("."))
            owners[parameter].add(_owner(model, name, parameter, of_experts))
    for parameter, found in owners.items():
        if len(found) > 1 and any(parameter in own for own in of_experts.values()):
            raise ValueError(f"experts cannot share a parameter with anything else: {', '.join(names[parameter])}")


def _owner(model: nn.Module, name: str, parameter: nn.Parameter, of_experts: Mapping[int, set[nn.Parameter]]) -> int:
    """The MoE layer to whose experts a parameter belongs at this place; 0 for the rest of the model."""
    path, _, _ = name.rpartition(".experts")
    while path or name.startswith("experts"):
        layer = model.get_submodule(path)
        if isinstance(layer, MoE) and parameter in of_experts[id(layer)]:
            return id(layer)
        if not path:
            break
        path = path.rpartition(".experts")[0]
    return 0
