"""How evenly the gates of a model load its experts."""

from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor, nn

from fmoe.balance import metrics
from fmoe.megatron.layers import MegatronMLP


def get_balance_profile(model: nn.Module) -> dict[str, list[Tensor | None]]:
    """Of each `MegatronMLP` of this process, in order, what the last pass came to; None before the first.

    By the names of `fmoe.balance.metrics`, of the rows that each expert got from this worker; and the gate's balance
    loss, without its weight, as "balance_loss", None where the gate has none.
    """
    layers = _layers(model)
    profile: dict[str, list[Tensor | None]] = {}
    for key, metric in metrics.items():
        stats = [layer.moe.last_stats for layer in layers]
        profile[key] = [None if one is None else metric(one.counts.float()) for one in stats]
    losses = [getattr(layer.gate, "loss", None) for layer in layers]
    profile["balance_loss"] = [None if loss is None else loss.detach().reshape(()) for loss in losses]
    return profile


def add_balance_log(model: nn.Module, writer: Any, iteration: int) -> None:
    """Write the profile, as the mean over the model's replicas: `balance-<metric>/layer-<number>` and `/all`.

    Layers are numbered from 0. Every process must call it.

    Args:
        model: wrapped or not.
        writer: with `add_scalar(name, value, iteration)`, as TensorBoard's; None on processes that do not write.
        iteration: the step's number.
    """
    layers, device = _layers(model), next(model.parameters()).device
    for key, values in get_balance_profile(model).items():
        known = [(layer, value) for layer, value in zip(layers, values, strict=True) if value is not None]
        if not known:
            continue
        mean = _mean(torch.stack([value.float().to(device) for _, value in known]))
        if writer is None:
            continue
        for (layer, _), value in zip(known, mean.tolist(), strict=True):
            writer.add_scalar(f"balance-{key}/layer-{(layer.layer_number or 1) - 1}", value, iteration)
        writer.add_scalar(f"balance-{key}/all", mean.mean().item(), iteration)


def _layers(model: nn.Module) -> list[MegatronMLP]:
    return [layer for layer in model.modules() if isinstance(layer, MegatronMLP)]


def _mean(values: Tensor) -> Tensor:
    group = parallel_state.get_data_parallel_group(with_context_parallel=True)
    dist.all_reduce(values, group=group)
    return values / dist.get_world_size(group)
