"""`FastMoEExperts`: fastmoe's experts inside Megatron's own MoELayer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from megatron.core.transformer.module import MegatronModule
from torch import Tensor

from fastmoe.experts import MLPExperts
from fastmoe.integrations.megatron.arguments import OF_THE_INSIDE, check_supported, inside_options
from fastmoe.integrations.megatron.build import mark_expert, place_of, start_experts
from fastmoe.integrations.megatron.groups import Groups
from fastmoe.integrations.megatron.sharded import forget_extra_states, stacked_state_dict
from fastmoe.kernels import Plan
from fastmoe.parallel.hidden import check_hidden, split_dimension, split_hidden

if TYPE_CHECKING:
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.transformer.transformer_config import TransformerConfig


class FastMoEExperts(MegatronModule):
    """In place of SequentialMLP or GroupedMLP: `MoESubmodules(experts=FastMoEExperts)`. Megatron routes and dispatches.

    Args:
        num_local_experts: e, experts in this process.
        config: Megatron's.
        pg_collection: process groups; None: those of `parallel_state`.
        name: as Megatron gives it; not used.

    Attributes:
        stacked: `fastmoe.experts.MLPExperts`.

    Raises:
        ValueError: an argument of Megatron that fastmoe does not have.
    """

    def __init__(
        self,
        num_local_experts: int,
        config: TransformerConfig,
        submodules: Any = None,
        pg_collection: ProcessGroupCollection | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(config)
        check_supported(config, OF_THE_INSIDE)
        self.groups = Groups.of(pg_collection)
        self.tp_group = self.groups.tp
        ep, device, seed = self.groups.ep, place_of(config), int(torch.randint(2**62, ()))
        inside = inside_options(config)
        whole = MLPExperts(num_local_experts, config.hidden_size, inside.pop("d_hidden"), **inside, device="meta")
        whole.num_experts = num_local_experts * ep.size
        whole.held = range(num_local_experts * ep.rank, num_local_experts * (ep.rank + 1))
        if self.groups.expert_tp.size > 1:
            check_hidden(whole, self.groups.expert_tp.size)
            split_hidden(whole, self.groups.expert_tp)
        self.stacked = whole.to(config.params_dtype)
        if device != "meta":
            self.stacked.to_empty(device=device)
            start_experts(self.stacked, config, seed)
        forget_extra_states(self)
        for parameter_name, parameter in self.stacked.named_parameters():
            mark_expert(parameter, self.groups, split=split_dimension(parameter_name) is not None)

    def forward(self, rows_ND: Tensor, tokens_per_expert: Tensor, probs_N: Tensor) -> tuple[Tensor, None]:
        """Weighted outputs `(N, h)` and no bias.

        Under expert tensor parallelism they are this process's share of a sum, which Megatron's dispatcher takes.

        Args:
            rows_ND: `(N, h)`, sorted by expert.
            tokens_per_expert: `(e,)`, on any device.
            probs_N: the weight of each row.
        """
        offsets_e = tokens_per_expert.to(rows_ND.device).cumsum(0).to(torch.int32)
        each_N = torch.arange(len(rows_ND), device=rows_ND.device)
        return self.stacked.mix_here(rows_ND, each_N, probs_N, Plan(each_N, offsets_e), 1), None

    def backward_dw(self) -> None:
        """Nothing: gradients of weights are there after backward, none are put off."""

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """For Megatron's distributed checkpoints, under the keys of its own experts: each can load the other's."""
        where = f"{prefix}stacked."
        return stacked_state_dict(self.stacked, self.groups, where, prefix, sharded_offsets, metadata)
