"""Functions over a whole model: its MoE layers, their statistics, balance losses and parameter counts."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from fastmoe._backward import backward_pass
from fastmoe.layer import MoE
from fastmoe.mmoe import MMoE
from fastmoe.monitor import LayerStats, TaskStats

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def moe_layers(model: nn.Module) -> dict[str, MoE]:
    """Every MoE layer of the model by its qualified name; a layer used at several places is listed once."""
    return {name: module for name, module in model.named_modules() if isinstance(module, MoE)}


def stats(model: nn.Module) -> dict[str, LayerStats | TaskStats]:
    """What each layer's last forward pass did, by layer name.

    Of an MoE layer, `LayerStats`: load, dropped choices, losses, entropy, dead experts. Of an MMoE layer, `TaskStats`:
    how much each task used each expert. Nothing waits for the device until a figure is read. Layers that have not run
    yet are left out.
    """
    layers = ((name, module) for name, module in model.named_modules() if isinstance(module, MoE | MMoE))
    return {name: layer.last_stats for name, layer in layers if layer.last_stats is not None}


def set_aux_loss_scale(model: nn.Module, scale: float | Tensor) -> None:
    """Multiply the gradient of every attached balance loss by `scale`, from the next forward pass on.

    Use what multiplies the main loss before `backward()`: `1 / steps` when gradients of that many micro-batches are
    accumulated, `scaler.get_scale()` with a `torch.amp.GradScaler`, or their product. Give a tensor of no dimension
    where the value changes and the model is compiled. Losses collected by `collect_aux_losses` are not scaled.
    """
    fits = scale.dim() == 0 if isinstance(scale, Tensor) else isinstance(scale, float | int) and math.isfinite(scale)
    if not fits:
        raise ValueError(f"scale must be a finite number or a tensor of no dimension, got {scale!r}")
    for layer in moe_layers(model).values():
        layer.aux_loss_scale = scale


def set_stats_group(model: nn.Module, group: "ProcessGroup | None") -> None:
    """The processes whose common batch balance losses and capacities are of; None: all that `torch.distributed` knows.

    Only in training, and for routers with `stats_scope="global"`. Every process of the group must run every MoE layer
    equally often.
    """
    for layer in moe_layers(model).values():
        layer.stats_group = group


@dataclass(frozen=True)
class AuxLoss:
    """One weighted balance loss of one layer; `value` is a scalar with gradient."""

    layer: str
    name: str
    value: Tensor


class AuxLosses(list[AuxLoss]):
    """The balance losses of the forward passes run inside `collect_aux_losses`, in the order they came."""

    def total(self) -> Tensor:
        """Their sum: a scalar with gradient, to be added to the main loss; 0 if there are none."""
        return sum((loss.value for loss in self), torch.zeros(()))


class _Sink:
    def __init__(self, losses: AuxLosses, name: str) -> None:
        self.losses, self.name, self.opened_in = losses, name, backward_pass()

    def receive(self, layer: MoE, losses: dict[str, Tensor]) -> None:
        if not torch.compiler.is_compiling() and backward_pass() != self.opened_in:
            self._check_recomputed(losses)
            return
        self.losses.extend(AuxLoss(self.name, name, value) for name, value in losses.items())

    def _check_recomputed(self, losses: dict[str, Tensor]) -> None:
        with_grad = any(loss.value.requires_grad for loss in self.losses if loss.layer == self.name)
        if any(value.requires_grad for value in losses.values()) and not with_grad:
            raise RuntimeError(
                f"the balance losses of {self.name!r} were collected without gradient, because reentrant activation "
                "checkpointing ran its first forward pass under no_grad. Use checkpoint(..., use_reentrant=False), or "
                "leave collect_aux_losses out: attached losses work under both"
            )


@contextmanager
def collect_aux_losses(model: nn.Module) -> Iterator[AuxLosses]:
    """Inside this context the model's balance losses are handed over instead of attached.

    ```
    with fastmoe.collect_aux_losses(model) as losses:
        output = model(x)
    loss = criterion(output, target) + losses.total()
    ```

    Gradients are those of attached losses. Losses are collected in training and in evaluation. A forward pass that
    activation checkpointing runs again in backward is counted once. Reentrant checkpointing runs its first pass under
    `no_grad`: losses collected around it have no gradient (`RuntimeError` if backward runs inside the context).
    """
    losses = AuxLosses()
    layers = moe_layers(model)
    before = {name: layer.loss_sink for name, layer in layers.items()}
    for name, layer in layers.items():
        layer.loss_sink = _Sink(losses, name)
    try:
        yield losses
    finally:
        for name, layer in layers.items():
            layer.loss_sink = before[name]
