"""`FastMoELayer`: the feed-forward block of a Megatron-Core layer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from megatron.core import tensor_parallel
from megatron.core.transformer.module import MegatronModule
from torch import Tensor

from fastmoe.integrations.megatron.arguments import layer_options
from fastmoe.integrations.megatron.build import build_moe
from fastmoe.integrations.megatron.groups import Groups
from fastmoe.integrations.megatron.losses import attach_losses
from fastmoe.integrations.megatron.sharded import forget_extra_states, layer_state_dict
from fastmoe.layer import MoE
from fastmoe.routers import SoftRouter

if TYPE_CHECKING:
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.transformer.transformer_config import TransformerConfig


class FastMoELayer(MegatronModule):
    """An `fastmoe.MoE` where Megatron-Core puts an MLP or its own MoELayer: `ModuleSpec(module=FastMoELayer)`.

    Experts are spread over Megatron's expert parallel group, and over its expert tensor parallel group by their hidden
    width. What Megatron's `TransformerConfig` says of MoE holds as far as fastmoe has it, see docs/megatron.md.

    Args:
        config: Megatron's. Its `num_moe_experts` is set where it is None, for Megatron to scale balance losses.
        num_experts: E; None: `config.num_moe_experts`.
        top_k: K; None: `config.moe_router_topk`.
        pg_collection: process groups; None: those of `parallel_state`.
        is_mtp_layer: whether it is in a layer for multi-token prediction.
        name: as Megatron gives it; not used.
        moe_options: further arguments of `fastmoe.MoE`, over what the configuration says.

    Attributes:
        moe: the `fastmoe.MoE`; `fastmoe.stats`, `fastmoe.LoadMonitor` and the like find it.

    Raises:
        ValueError: an argument of Megatron that fastmoe does not have, or that does not go with another.
    """

    def __init__(
        self,
        config: TransformerConfig,
        num_experts: int | None = None,
        top_k: int | None = None,
        *,
        submodules: Any = None,
        layer_number: int | None = None,
        pg_collection: ProcessGroupCollection | None = None,
        is_mtp_layer: bool = False,
        name: str | None = None,
        **moe_options: Any,
    ) -> None:
        super().__init__(config)
        if submodules is not None:
            raise ValueError("FastMoELayer has no submodules: give its experts by expert=, its router by router=")
        self.groups = Groups.of(pg_collection)
        self.tp_group = self.groups.tp  # MegatronModule looks for it
        number = _number_of_experts(config, num_experts)
        chosen = config.moe_router_topk if top_k is None else top_k
        self.moe: MoE = build_moe(config, self.groups, number, chosen, layer_options(config, moe_options))
        over_all = config.moe_router_load_balancing_type in ("global_aux_loss", ["global_aux_loss"])
        self.stats_group = self.groups.global_batch if over_all else self.groups.batch
        self.is_mtp_layer = is_mtp_layer
        self.layer_number = layer_number
        self.recompute = _recomputed(config)
        forget_extra_states(self)
        self.by_sequence = _goes_by_sequence(self.moe, config, self.groups)

    def set_layer_number(self, layer_number: int) -> None:
        """Where it stands in the model, from 1, for Megatron's metrics."""
        self.layer_number = layer_number
        self.moe.dispatcher.name = f"layer {layer_number}"

    def backward_dw(self) -> None:
        """Nothing: gradients of weights are there after backward, none are put off."""

    def forward(self, hidden_states: Tensor, padding_mask: Tensor | None = None) -> tuple[Tensor, None]:
        """Output and no bias, as Megatron's MLP returns them.

        Args:
            hidden_states: `(s, b, h)`; with sequence parallelism this process's part of the sequence.
            padding_mask: bool `(b, s)`, True at padding, which is computed, but counts in no loss.

        Raises:
            ValueError: in training, tensor parallelism without sequence parallelism and without expert tensor
                parallelism: every process would send the same tokens.
        """
        groups = self.groups
        if self.training and groups.tp.size() > 1 and not (groups.whole_sequence or self.config.sequence_parallel):
            raise ValueError(
                "tensor parallelism needs sequence_parallel=True, or expert_tensor_parallel_size="
                f"{groups.tp.size()}, for each process to route tokens of its own"
            )
        if self.recompute and self.training:
            return tensor_parallel.checkpoint(self._forward, False, hidden_states, padding_mask), None
        return self._forward(hidden_states, padding_mask), None

    def _forward(self, x_SBD: Tensor, padding_mask: Tensor | None) -> Tensor:
        counted = None if padding_mask is None else ~padding_mask.bool()
        gathers = self.config.sequence_parallel and self.groups.whole_sequence
        if not gathers:
            return self._run(x_SBD, counted)
        x_SBD = tensor_parallel.gather_from_sequence_parallel_region(
            x_SBD, tensor_parallel_output_grad=False, group=self.groups.tp
        )
        if counted is not None:
            parts = self.groups.expert_tp.gather(counted)  # as large as the model's tensor parallel group, in its order
            counted = torch.cat(parts.unbind(), dim=1)
        y_SBD = self._run(x_SBD, counted)
        return tensor_parallel.scatter_to_sequence_parallel_region(y_SBD, group=self.groups.tp)

    def _run(self, x_SBD: Tensor, counted_BS: Tensor | None) -> Tensor:
        moe = self.moe
        mask = counted_BS if self.by_sequence or counted_BS is None else counted_BS.T
        sink = None if moe.loss_sink is not None else _Losses()
        moe.stats_group, moe.token_mask = self.stats_group, mask
        moe.loss_sink = sink or moe.loss_sink
        try:
            y = moe(x_SBD.transpose(0, 1)).transpose(0, 1).contiguous() if self.by_sequence else moe(x_SBD)
        finally:
            moe.token_mask = None
            if sink is not None:
                moe.loss_sink = None
        if sink is None or not (self.training and torch.is_grad_enabled()):
            return y
        return attach_losses(self, y, sink.losses, x_SBD.shape[0] * x_SBD.shape[1] if mask is None else mask.sum())

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """For Megatron's distributed checkpoints, under the keys of its own MoELayer: each can load the other's.

        Experts go by their global number, so that a checkpoint fits any expert parallel size.
        """
        return layer_state_dict(self.moe, self.groups, prefix, sharded_offsets, metadata)


class _Losses:
    """Takes a layer's balance losses, for Megatron to attach."""

    def __init__(self) -> None:
        self.losses: dict[str, Tensor] = {}

    def receive(self, layer: MoE, losses: dict[str, Tensor]) -> None:
        self.losses = losses


def _number_of_experts(config: TransformerConfig, asked: int | None) -> int:
    said = experts_said(config)
    if asked is None and said is None:
        raise ValueError("give num_experts=, or TransformerConfig(num_moe_experts=)")
    if asked is not None and said is not None and asked != said:
        raise ValueError(f"num_experts={asked}, but the configuration says num_moe_experts={said}")
    if asked is None:
        return config.num_moe_experts
    if said is None:
        config.num_moe_experts, config.num_moe_experts_by_fastmoe = asked, True
    return asked


def experts_said(config: TransformerConfig) -> int | None:
    """The `num_moe_experts` that the user gave; not what an earlier layer of fastmoe's wrote there."""
    return None if getattr(config, "num_moe_experts_by_fastmoe", False) else config.num_moe_experts


def _recomputed(config: TransformerConfig) -> bool:
    """Whether the layer recomputes itself in backward, as Megatron leaves it to its MoE layers."""
    return config.recompute_granularity == "selective" and "moe" in (config.recompute_modules or [])


def _goes_by_sequence(moe: MoE, config: TransformerConfig, groups: Groups) -> bool:
    """Whether the router must have tokens sequence by sequence, where Megatron has them position by position.

    Raises:
        ValueError: it must, and a process has parts of sequences only.
    """
    if not (isinstance(moe.router, SoftRouter) or getattr(moe.router, "sequence_loss_weight", False)):
        return False
    in_parts = groups.cp_size > 1 or (config.sequence_parallel and groups.tp.size() > 1 and not groups.whole_sequence)
    if in_parts:
        raise ValueError(
            f"{type(moe.router).__name__} goes by whole sequences, of which each process has a part: without context "
            "parallelism, set expert_tensor_parallel_size=tensor_model_parallel_size"
        )
    return True
