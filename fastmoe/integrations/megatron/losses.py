"""Balance losses on Megatron's way: attached by its scaler, recorded in its metrics."""

from __future__ import annotations

from typing import TYPE_CHECKING

from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from torch import Tensor

if TYPE_CHECKING:
    from megatron.core.transformer.module import MegatronModule
    from torch.distributed import ProcessGroup

# fastmoe's name of a loss: Megatron's, and the router's attribute with its weight, which is left out of metrics.
NAMES = {
    "load_balance": ("load_balancing_loss", "aux_loss_weight"),
    "z": ("z_loss", "z_loss_weight"),
    "sequence_balance": ("seq_load_balancing_loss", "sequence_loss_weight"),
}


def attach_losses(layer: MegatronModule, y: Tensor, losses: dict[str, Tensor], num_tokens: int | Tensor) -> Tensor:
    """`y`, with the losses in its graph.

    A loss is that of all processes of the statistics group, and its gradient here is scaled for their mean to be
    right. Megatron takes the mean over replicas of the model alone, and the sum within one.

    Args:
        layer: a `FastMoELayer`.
        y: its output.
        losses: weighted, by name.
        num_tokens: tokens here that count. With `calculate_per_token_loss` Megatron divides all gradients by the number
            of all tokens, which this undoes.
    """
    config, sharers = layer.config, layer.groups.sharers
    factor = num_tokens if config.calculate_per_token_loss else 1 / sharers
    repeated = config.mtp_num_layers if layer.is_mtp_layer and getattr(config, "mtp_use_repeated_layer", False) else 1
    for name, loss in losses.items():
        loss = loss / (repeated or 1)
        _record(layer, name, loss)
        y = MoEAuxLossAutoScaler.apply(y, loss * factor * layer.moe.aux_loss_scale)
    return y


def _record(layer: MegatronModule, name: str, loss: Tensor) -> None:
    config, router = layer.config, layer.moe.router
    known, weight_name = NAMES.get(name, (name, ""))
    if name == "load_balance" and layer.stats_group is layer.groups.global_batch:
        known = "global_load_balancing_loss"
    value = loss.detach() / (getattr(router, weight_name, 1.0) or 1.0)
    mtp_layers = config.mtp_num_layers or 0
    number = layer.layer_number
    if number is not None and layer.is_mtp_layer:
        number += config.num_layers
    _keep(known, value, number, config.num_layers + mtp_layers, layer.groups.global_batch)


def _keep(name: str, value: Tensor, layer_number: int | None, num_layers: int, mean_of: ProcessGroup) -> None:
    try:
        from megatron.core.transformer.moe.moe_logging import get_moe_metrics_tracker
    except ImportError:  # before 0.17
        from megatron.core.transformer.moe.moe_utils import save_to_aux_losses_tracker

        save_to_aux_losses_tracker(name, value, layer_number, num_layers, avg_group=mean_of)
    else:
        get_moe_metrics_tracker().record(name, value, layer_number, num_layers, avg_group=mean_of)
