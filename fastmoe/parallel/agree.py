"""Whether all processes are about to build the same thing; found out before anything can hang."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence

import torch.distributed as dist
from torch import nn

from fastmoe.model import moe_layers
from fastmoe.parallel.engines import find_parallel
from fastmoe.parallel.layout import Layout


def check_agreement(model: nn.Module, layout: Layout, options: dict[str, object]) -> None:
    """Every process calls it with its own model, before that is sharded.

    Raises:
        ValueError: on every process, if one differs from the first; names the processes and the difference.
    """
    own = describe(model, layout, options)
    mine = (dist.get_rank(), hashlib.sha256("\n".join(own).encode()).hexdigest())
    everyone = _gather(mine, layout)
    if len({digest for _, digest in everyone}) == 1:
        return
    descriptions = dict(_gather((mine[0], own), layout))
    first = min(descriptions)
    for rank in sorted(descriptions):
        difference = first_difference(descriptions[first], descriptions[rank])
        if difference is not None:
            here, there = difference
            raise ValueError(
                f"all processes must parallelize the same model in the same way; process {first} has {here}, "
                f"process {rank} has {there}"
            )


def describe(model: nn.Module, layout: Layout, options: dict[str, object]) -> list[str]:
    """Everything in which processes must not differ, one fact a line."""
    if find_parallel(model) is not None:
        return ["a model that is parallel already"]
    lines = [f"a mesh of {layout}", *(f"{name}={value!r}" for name, value in options.items())]
    for name, layer in moe_layers(model).items():
        lines += [
            f"MoE layer {name!r} of {layer.num_experts} experts, top_k={layer.top_k}",
            f"MoE layer {name!r} with {' '.join(str(layer.router).split())}",
            f"MoE layer {name!r} with {type(layer.experts).__name__}({layer.experts.extra_repr()})",
        ]
    for kind, tensors in (("parameter", model.named_parameters()), ("buffer", model.named_buffers())):
        for name, tensor in tensors:
            frozen = "" if tensor.requires_grad or kind == "buffer" else ", frozen"
            lines.append(f"{kind} {name!r} {tuple(tensor.shape)} {tensor.dtype} on {tensor.device.type}{frozen}")
    return [re.sub(r" at 0x[0-9a-f]+", "", line) for line in lines]  # where objects lie differs without meaning


def first_difference(one: Sequence[str], other: Sequence[str]) -> tuple[str, str] | None:
    """The first lines in which two descriptions differ."""
    end = "nothing more"
    for i in range(max(len(one), len(other))):
        lines = tuple(lines[i] if i < len(lines) else end for lines in (one, other))
        if lines[0] != lines[1]:
            return lines[0], lines[1]
    return None


def _gather(value: tuple, layout: Layout) -> list:
    """Over all processes where the mesh has all, else over the mesh's own."""
    group = None if layout.mesh.size() == dist.get_world_size() else layout.everyone.get_group()
    gathered: list = [None] * dist.get_world_size(group)
    dist.all_gather_object(gathered, value, group=group)
    return gathered
