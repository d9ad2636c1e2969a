"""Megatron's process groups, as a layer needs them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from megatron.core import parallel_state
from megatron.core.transformer.moe.moe_utils import get_default_pg_collection

from fastmoe._processes import Processes

if TYPE_CHECKING:
    from megatron.core.process_groups_config import ProcessGroupCollection
    from torch.distributed import ProcessGroup


@dataclass(frozen=True)
class Groups:
    """Who holds which experts and which tokens.

    Attributes:
        ep: processes that the experts are spread over.
        expert_tp: processes that share the hidden width of each expert.
        expert_dp_rank: which replica of these experts this process holds.
        tp: the tensor parallel group of the model.
        cp_size: processes that a sequence is spread over, by context parallelism.
        batch, global_batch: processes with the tokens of one micro-batch of one replica of the model, and of all
            replicas; in both, processes with other tokens than this one.
    """

    ep: Processes
    expert_tp: Processes
    expert_dp_rank: int
    tp: ProcessGroup
    cp_size: int
    batch: ProcessGroup
    global_batch: ProcessGroup

    @classmethod
    def of(cls, collection: ProcessGroupCollection | None) -> Groups:
        """Those of a collection; of None, Megatron's own.

        Raises:
            ValueError: the experts' tensor parallel size is neither 1 nor that of the model.
        """
        given: Any = get_default_pg_collection() if collection is None else collection
        tp, expert_tp = given.tp.size(), given.expt_tp.size()
        if expert_tp not in (1, tp):
            raise ValueError(
                f"expert_tensor_parallel_size must be 1 or tensor_model_parallel_size={tp}, got {expert_tp}"
            )
        whole = expert_tp > 1
        dp_cp = getattr(given, "dp_cp", None) or parallel_state.get_data_parallel_group(with_context_parallel=True)
        return cls(
            Processes.of(given.ep),
            Processes.of(given.expt_tp),
            given.expt_dp.rank(),
            given.tp,
            given.cp.size(),
            given.cp if whole else given.tp_cp,
            dp_cp if whole else given.tp_dp_cp,
        )

    @property
    def whole_sequence(self) -> bool:
        """Whether every process of the tensor parallel group routes all of its tokens: each has a part of every expert.

        Otherwise each routes a part of the sequence, and experts are spread over the tensor parallel group too.
        """
        return self.expert_tp.size > 1

    @property
    def sharers(self) -> int:
        """How many processes' losses add up to that of one replica of the model, whose mean Megatron takes."""
        return self.cp_size * (1 if self.whole_sequence else self.tp.size())

    @property
    def experts_apart(self) -> bool:
        """Whether experts have other replicas than the rest of the model: Megatron's `allreduce=False`."""
        return self.ep.size > 1 or self.expert_tp.size != self.tp.size()

    def __deepcopy__(self, memo: dict[int, Any]) -> Groups:
        """Itself: process groups cannot be copied."""
        return self
