"""What `parallelize` looks at before it changes anything."""

from __future__ import annotations

import inspect
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from fastmoe._errors import check_choice, unknown_name
from fastmoe.layer import MoE
from fastmoe.parallel.layout import Layout
from fastmoe.parallel.shard import expert_parameters

ENGINES = ("ddp", "fsdp")
OURS = {"module", "mesh", "device_mesh", "process_group", "ignored_params"}


def check_engine(
    model: nn.Module,
    layout: Layout,
    engine: str,
    blocks: Sequence[type[nn.Module]],
    options: Mapping[str, Any],
) -> None:
    """Whether there is such an engine, it knows its options, and can take the model.

    Raises:
        ValueError: not so; says why.
    """
    check_choice("engine", engine, ENGINES)
    if engine == "fsdp" and "tp" in (layout.mesh.mesh_dim_names or ()):
        raise ValueError("engine 'fsdp' takes a mesh of dp and ep; tp is for engine 'ddp'")
    if blocks and engine == "ddp":
        raise ValueError("blocks are for engine 'fsdp'")
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
    modules = dict(model.named_modules(remove_duplicate=False))
    layers = {f"{name}.experts.".lstrip("."): m for name, m in modules.items() if isinstance(m, MoE)}
    of_experts = {id(layer): set(expert_parameters(layer).values()) for layer in layers.values()}
    for name, module in modules.items():
        for own, parameter in module.named_parameters(recurse=False):
            whole = f"{name}.{own}".lstrip(".")
            around = [id(layer) for prefix, layer in layers.items() if whole.startswith(prefix)]
            inside = [layer for layer in around if parameter in of_experts[layer]]
            names[parameter].append(whole)
            owners[parameter].add(inside[-1] if inside else 0)  # the innermost layer; 0 is the rest of the model
    for parameter, found in owners.items():
        if len(found) > 1 and any(parameter in routed for routed in of_experts.values()):
            raise ValueError(f"experts cannot share a parameter with anything else: {', '.join(names[parameter])}")
