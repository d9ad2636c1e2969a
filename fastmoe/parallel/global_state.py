"""What this process holds of a model, in the names, shapes and expert numbers of the whole model."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from fastmoe.experts import MLPExperts, ModuleExperts
from fastmoe.layer import MoE
from fastmoe.parallel.global_state_hidden import HiddenPart
from fastmoe.parallel.global_state_placement import placed

MODULES = "experts.modules_list."
RECOMPUTED = "_checkpoint_wrapped_module"  # PyTorch's activation checkpointing keeps it out of the state_dict's names


@dataclass(frozen=True)
class Piece:
    """A box of one tensor of the whole model.

    Attributes:
        name: of the tensor.
        local: the box. Memory is shared with the model: what is copied into it is loaded.
        shape: of the whole tensor.
        offset: where in it the box begins.
        layer: the MoE layer whose stacked experts dimension 0 counts; None for any other tensor.
        hidden: where `local` is only this process's part of the box's hidden width.
        buffer: of a model that is replicated, the first process's counts.
    """

    name: str
    local: Tensor
    shape: tuple[int, ...]
    offset: tuple[int, ...]
    layer: str | None = None
    hidden: HiddenPart | None = None
    buffer: bool = False

    @property
    def whole(self) -> bool:
        """Whether this process holds all of the tensor."""
        return tuple(self.local.shape) == self.shape


@dataclass(frozen=True)
class ModuleLayer:
    """An MoE layer whose experts are modules, so that names carry expert numbers."""

    name: str
    num_experts: int
    held: range


@dataclass(frozen=True)
class ModelState:
    """The pieces of all parameters and persistent buffers, by name.

    Attributes:
        pieces: by name.
        of: by parameter; of one with several names, by the first.
        module_layers: by what comes before the expert's number in names.
    """

    pieces: dict[str, Piece]
    of: dict[Tensor, Piece]
    module_layers: dict[str, ModuleLayer]

    def expert(self, name: str) -> tuple[ModuleLayer, int] | None:
        """The layer, of those with modules as experts, and the number of the expert to which a tensor belongs."""
        end = name.find(MODULES)
        while end >= 0:
            prefix = name[: end + len(MODULES)]
            number = name[len(prefix) :].partition(".")[0]
            if prefix in self.module_layers and number.isdigit():
                return self.module_layers[prefix], int(number)
            end = name.find(MODULES, end + 1)
        return None

    def elsewhere(self, name: str) -> bool:
        """Whether the name is one of an expert that other processes hold."""
        if (expert := self.expert(name)) is None:
            return False
        layer, number = expert
        return number < layer.num_experts and number not in layer.held


def model_state(model: nn.Module) -> ModelState:
    """The state of a model, sharded or not; wrapped in DistributedDataParallel or by torch.compile or not.

    Raises:
        ValueError: a state_dict with something that is no parameter and no buffer, or on the meta device.
    """
    model = _unwrapped(model)
    entries = model.state_dict(keep_vars=True)  # FSDP frees what it has gathered: names are sharded from here on
    own = {id(tensor) for tensor in (*model.parameters(), *model.buffers())}
    layers = [(_saved_name(name), m) for name, m in model.named_modules(remove_duplicate=False)]
    stacked = {param: found for name, m in layers for param, found in _stacked_in(name, m)}
    pieces: dict[str, Piece] = {}
    of: dict[Tensor, Piece] = {}
    for name, tensor in entries.items():
        if not isinstance(tensor, Tensor) or id(tensor) not in own:
            kind = type(tensor).__name__
            raise ValueError(f"{name!r} of the state_dict must be a parameter or a buffer of the model, got {kind}")
        if tensor.is_meta:
            raise ValueError(f"{name!r} is on the meta device and has no values: give the model memory first")
        pieces[name] = _stacked(name, tensor, *stacked[tensor]) if tensor in stacked else _plain(name, tensor)
        of.setdefault(tensor, pieces[name])
    return ModelState(pieces, of, {prefix: found for name, m in layers for prefix, found in _modules_in(name, m)})


def _unwrapped(model: nn.Module) -> nn.Module:
    while True:
        if isinstance(model, DistributedDataParallel):
            model = model.module
        elif isinstance(compiled := getattr(model, "_orig_mod", None), nn.Module):
            model = compiled
        else:
            return model


def _saved_name(module: str) -> str:
    return ".".join(part for part in module.split(".") if part != RECOMPUTED)


def _stacked_in(layer: str, module: nn.Module) -> Iterator[tuple[Tensor, tuple[str, MLPExperts, str]]]:
    if isinstance(module, MoE) and isinstance(experts := module.experts, MLPExperts):
        for name, param in experts.named_parameters(recurse=False):
            yield param, (layer, experts, name)


def _modules_in(layer: str, module: nn.Module) -> Iterator[tuple[str, ModuleLayer]]:
    if isinstance(module, MoE) and isinstance(experts := module.experts, ModuleExperts):
        yield f"{layer}.{MODULES}".lstrip("."), ModuleLayer(layer, module.num_experts, experts.held)


def _plain(name: str, tensor: Tensor) -> Piece:
    return Piece(name, *placed(name, tensor), buffer=not isinstance(tensor, nn.Parameter))


def _stacked(name: str, tensor: Tensor, layer: str, experts: MLPExperts, param: str) -> Piece:
    local, shape, offset = placed(name, tensor)
    if not isinstance(tensor, DTensor):
        shape, offset = (experts.num_experts, *shape[1:]), (experts.held.start, *offset[1:])
    if experts.tp.size == 1:
        return Piece(name, local, shape, offset, layer)
    hidden = HiddenPart(experts, param)
    return Piece(name, local, hidden.whole_shape(shape), offset, layer, hidden if hidden.split else None)


def staged(piece: Piece) -> Tensor:
    """A copy in the memory of the CPU."""
    return torch.empty_like(piece.local, device="cpu").copy_(piece.local)
