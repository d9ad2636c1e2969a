"""Memory and first values for a model that was built on the meta device."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable

import torch
from torch import Tensor, nn

from fastmoe._seeds import mix
from fastmoe.experts import MLPExperts, local
from fastmoe.parallel.hidden import split_dimension, take_hidden
from fastmoe.routers import Router


@torch.no_grad()
def materialize(model: nn.Module, device: torch.device | str, *, seed: int = 0) -> nn.Module:
    """Give a model on the meta device its memory and first values, in place: of experts only this process's own.

    ```
    with torch.device("meta"):
        model = Model()
    fastmoe.parallelize(model, mesh)
    fastmoe.materialize(model, "cuda")
    optimizer = torch.optim.AdamW(model.parameters())
    ```

    Every module that has parameters or buffers of its own is initialised by its `reset_parameters`, from random numbers
    that depend on `seed` and its name alone, and experts on their global number: the same on any layout.

    Args:
        model: all of it on the meta device; before or after `fastmoe.parallelize`.
        device: of the memory.
        seed: the same on every process.

    Returns:
        The same model.

    Raises:
        ValueError: a tensor that is not on the meta device, or a module that cannot initialise itself; names them.
    """
    names = {
        name: module for name, module in model.named_modules() if _own_tensors(module) or isinstance(module, Router)
    }
    placed = [name for name, tensor in _all_tensors(model) if not tensor.is_meta]
    if placed:
        raise ValueError(f"materialize wants the whole model on the meta device; {', '.join(placed[:5])} are not")
    lost = [f"{name} ({type(module).__name__})" for name, module in names.items() if _reset_of(module) is None]
    if lost:
        raise ValueError(f"these modules have parameters or buffers and no reset_parameters: {', '.join(lost[:5])}")
    ties = _ties(model)
    model.to_empty(device=device)
    for (first_module, first_name), *others in ties:
        for module, name in others:
            setattr(module, name, getattr(first_module, first_name))
    devices = [torch.device(device)] if torch.device(device).type == "cuda" else []
    with torch.random.fork_rng(devices):
        for name, module in reversed(names.items()):  # what a router does with its parts comes after what they do
            if isinstance(module, MLPExperts):
                _reset_stacked(module, name, seed)
            else:
                torch.manual_seed(mix(seed, name))
                _reset_whole(module)
    return model


def _own_tensors(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(recurse=False), *module.buffers(recurse=False)]


def _all_tensors(model: nn.Module) -> list[tuple[str, Tensor]]:
    return [*model.named_parameters(), *model.named_buffers()]


def _reset_of(module: nn.Module) -> Callable[[], None] | None:
    for name in ("reset_parameters", "_reset_parameters"):  # the latter is MultiheadAttention's
        if callable(reset := getattr(module, name, None)):
            return reset
    return None


def _ties(model: nn.Module) -> list[list[tuple[nn.Module, str]]]:
    """Where one parameter stands at several places, which `to_empty` makes several of."""
    places: dict[nn.Parameter, list[tuple[nn.Module, str]]] = defaultdict(list)
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            places[parameter].append((module, name))
    return [found for found in places.values() if len(found) > 1]


def _reset_whole(module: nn.Module) -> None:
    """Call the module's own initialisation on whole parameters, and keep this process's shards of them."""
    from torch.distributed.tensor import distribute_tensor

    parts = module.modules() if isinstance(module, Router) else [module]
    sharded = [(m, n, p) for m in parts for n, p in m.named_parameters(recurse=False) if hasattr(p, "placements")]
    for part, name, parameter in sharded:
        whole = torch.empty(parameter.shape, dtype=parameter.dtype, device=local(parameter).device)
        part._parameters[name] = nn.Parameter(whole)
    reset = _reset_of(module)
    assert reset is not None
    reset()
    for part, name, parameter in sharded:
        whole = getattr(part, name).detach()
        mesh, placements = parameter.device_mesh, parameter.placements  # type: ignore[attr-defined]
        shard = distribute_tensor(whole, mesh, placements, src_data_rank=None)
        local(parameter).copy_(shard.to_local())
        part._parameters[name] = parameter


def _reset_stacked(experts: MLPExperts, name: str, seed: int) -> None:
    """Each expert from numbers of its own, drawn whole, of which this process keeps its part."""
    for parameter_name, parameter in experts.named_parameters(recurse=False):
        rows = local(parameter)
        bound, dim = experts.bound(parameter_name), split_dimension(parameter_name)
        for row, number in zip(rows, range(_first(experts, parameter), experts.num_experts), strict=False):
            torch.manual_seed(mix(seed, name, parameter_name, number))
            shape = [1, *rows.shape[1:]]
            if dim is not None:
                shape[dim] *= experts.tp.size
            whole = torch.empty(shape, device=rows.device, dtype=rows.dtype).uniform_(-bound, bound)
            row.copy_(take_hidden(experts, parameter_name, whole)[0])


def _first(experts: MLPExperts, parameter: nn.Parameter) -> int:
    """The number of the first expert in this process's part of a parameter."""
    from fastmoe.parallel.global_state_placement import placed

    _, _, offset = placed("experts", parameter)
    return offset[0] if hasattr(parameter, "placements") else experts.held.start
