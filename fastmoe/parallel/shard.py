"""Experts over processes: each keeps its own and sends the others' rows away."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from fastmoe.dispatch import AllToAllDispatcher, Slices, Spread
from fastmoe.experts import MLPExperts, ModuleExperts
from fastmoe.layer import MoE
from fastmoe.parallel.hidden import check_hidden, split_hidden
from fastmoe.parallel.layout import Layout, processes_of

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


def shard_layer(
    layer: MoE,
    layout: Layout,
    *,
    name: str = "",
    chunks: int = 1,
    suppress_duplicates: bool = False,
    as_dtensors: bool = False,
) -> None:
    """Leave a layer the experts of this process, and give it the groups that it needs.

    Gradients of the experts are means over the processes that they are spread over, see `AllToAllDispatcher`.

    Args:
        layer: with all experts, on any device, "meta" included.
        layout: who holds what.
        name: of the layer, for errors.
        chunks, suppress_duplicates: see `fastmoe.dispatch.AllToAllDispatcher`.
        as_dtensors: stacked parameters become DTensors of the whole layer's shape, as FSDP wants them.

    Raises:
        ValueError: a layer that is sharded already, or cannot be in this way.
    """
    check_layer(layer, layout, name)
    same_tokens = processes_of(layout.same_tokens, name)
    layer.stats_group = layout.batch_group
    if same_tokens.size > 1 and layout.tp == "hidden":
        split_hidden(layer.experts, same_tokens)
    elif same_tokens.size > 1:
        layer.slices = Slices(same_tokens)
    spread = _spread(layer, layout, name)
    if spread is None:
        layer.dispatcher.name = name
        return
    layer.experts.spread_over = spread.processes.size
    if isinstance(layer.experts, ModuleExperts):
        layer.experts.keep(spread.held)
    else:
        keep_stacked(layer.experts, spread, as_dtensors)
    layer.dispatcher = AllToAllDispatcher(
        spread,
        chunks=chunks,
        suppress_duplicates=suppress_duplicates,
        backend=layer.backend,
        name=name,
        uniform=isinstance(layer.experts, MLPExperts),
    )


def check_layer(layer: MoE, layout: Layout, name: str = "") -> None:
    """Whether `shard_layer` can; it changes nothing, and answers alike on every process.

    Raises:
        ValueError: a layer that is sharded already, or cannot be in this way.
    """
    if isinstance(layer.dispatcher, AllToAllDispatcher) or layer.slices is not None or layer.experts.tp.size > 1:
        raise ValueError(f"MoE layer {name!r} is parallel already")
    spread = _spread(layer, layout, name)
    try:
        if layout.tp == "hidden" and layout.size("tp") > 1:
            check_hidden(layer.experts, layout.size("tp"))
        if spread is not None and isinstance(layer.experts, ModuleExperts):
            layer.experts.check_spread([spread.held_by(rank) for rank in range(spread.processes.size)])
    except ValueError as error:
        raise ValueError(f"MoE layer {name!r}: {error}") from None


def _spread(layer: MoE, layout: Layout, name: str) -> Spread | None:
    mesh = layout.experts
    return None if mesh is None or mesh.size() == 1 else Spread(layer.num_experts, processes_of(mesh, name), mesh)


def keep_stacked(experts: MLPExperts, spread: Spread, as_dtensors: bool = False) -> None:
    """Leave all experts but this process's to others."""
    held = spread.held
    experts.held = held
    for name, whole in list(experts.named_parameters(recurse=False)):
        own = whole.detach()[held.start : held.stop].clone()
        tensor = as_shard(own, spread.mesh, whole.shape) if as_dtensors else own
        setattr(experts, name, nn.Parameter(tensor, whole.requires_grad))


def expert_parameters(layer: MoE) -> dict[str, nn.Parameter]:
    """The parameters that belong to single experts; not those of a module given as activation, which all share."""
    return dict(layer.experts.named_parameters(recurse=isinstance(layer.experts, ModuleExperts)))


def as_shard(own: Tensor, mesh: DeviceMesh | None, shape: torch.Size) -> Tensor:
    """The DTensor of all experts of which `own` is this process's part; they share memory."""
    from torch.distributed.tensor import DTensor, Shard

    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(own, mesh, [Shard(0)], run_check=False, shape=shape, stride=stride)
