"""The way of rows to the experts and back, on one worker or several."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from fastmoe import kernels
from fastmoe._processes import Processes
from fastmoe.dispatch.exchange import Exchange
from fmoe.workers import workers

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

PLACE = "fmoe layer"


@dataclass(frozen=True)
class Passage:
    """Which rows go to which worker and come from which, for P workers of e experts each.

    Attributes:
        processes: the workers.
        pos_N: int64, where each row that is sent stands among the choices, T * K of them; sorted by expert.
        sent_Pe: int64 on the CPU, how many rows go to each expert.
        came_Pe: int64 on the CPU, how many rows come from each worker for each expert here.
    """

    processes: Processes
    pos_N: Tensor
    sent_Pe: Tensor
    came_Pe: Tensor

    def there(self, rows_ND: Tensor) -> tuple[Tensor, Tensor | None]:
        """The rows that come here, by expert and then by worker, for those sent, sorted by expert.

        The second is a ticket for `back`; see `fastmoe.dispatch.exchange.Flight.finish`.
        """
        if self.processes.size == 1:
            return rows_ND, None
        exchange = Exchange(self.processes, self._sent_P, self._came_P, PLACE)
        rows_RD, ticket = exchange.start(rows_ND).finish()
        return rows_RD.index_select(0, self._by_expert().to(rows_RD.device)), ticket

    def back(self, rows_RO: Tensor, after: Tensor | None = None) -> Tensor:
        """The answers to the rows sent, sorted by expert, for those of the rows that came.

        Raises:
            ValueError: more or fewer answers than rows came.
        """
        came = int(self.came_Pe.sum())
        if len(rows_RO) != came:
            raise ValueError(f"the experts were given {came} rows and must answer as many, got {tuple(rows_RO.shape)}")
        if self.processes.size == 1:
            return rows_RO
        rows_RO = rows_RO.index_select(0, self._by_expert().argsort().to(rows_RO.device))
        exchange = Exchange(self.processes, self._came_P, self._sent_P, PLACE)
        return exchange.start(rows_RO, after).finish()[0]

    @property
    def _sent_P(self) -> list[int]:
        return self.sent_Pe.sum(1).tolist()

    @property
    def _came_P(self) -> list[int]:
        return self.came_Pe.sum(1).tolist()

    def _by_expert(self) -> Tensor:
        """Rows come by worker, then expert: their places in the order of experts, then workers."""
        experts_Pe = torch.arange(self.came_Pe.shape[1]).expand_as(self.came_Pe)
        return experts_Pe.reshape(-1).repeat_interleave(self.came_Pe.reshape(-1)).argsort(stable=True)


def sort_choices(expert_ids: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """Choices in the order of experts, those of -1 last, and how many each expert has, int64 `(E,)`."""
    plan = kernels.plan(expert_ids.reshape(-1), num_experts)
    return plan.order_N, plan.counts_E.long()


def swap_counts(sent_E: Tensor, num_expert: int, processes: Processes) -> Tensor:
    """How many rows come from each worker for each expert here, `(P * e,)`, for how many go to each expert."""
    each = [num_expert] * processes.size
    with torch.no_grad():
        return sent_E if processes.size == 1 else Exchange(processes, each, each, PLACE).send(sent_E)


def rows_to_choices(rows_NO: Tensor, pos_N: Tensor, num_choices: int) -> Tensor:
    """Rows where they stand among all choices, `(num_choices, O)`; zeros for those without."""
    return rows_NO.new_zeros(num_choices, *rows_NO.shape[1:]).index_copy(0, pos_N, rows_NO)


def through_experts(
    inp: Any,
    expert_ids_TK: Tensor,
    expert_fn: Callable[[Any, Tensor], Any],
    num_expert: int,
    world_size: int,
    group: "ProcessGroup | None",
) -> Any:
    """The experts' answer to each choice, `(T * K, ...)` or a structure of such; zeros where a choice is -1."""
    processes, top_k = workers(world_size, group), expert_ids_TK.shape[1]
    order_N, sent_E = sort_choices(expert_ids_TK, num_expert * world_size)
    came_Pe = swap_counts(sent_E, num_expert, processes).cpu().view(-1, num_expert)
    sent_Pe = sent_E.cpu().view(-1, num_expert)
    pos_N = order_N[: int(sent_Pe.sum())]
    passage = Passage(processes, pos_N, sent_Pe, came_Pe)
    tokens_N = pos_N.div(top_k, rounding_mode="floor")
    leaves, structure = tree_flatten(inp)
    arrived = [passage.there(leaf.index_select(0, tokens_N)) for leaf in leaves]
    tickets = [ticket for _, ticket in arrived if ticket is not None]
    answer = expert_fn(tree_unflatten([rows for rows, _ in arrived], structure), came_Pe.sum(0))
    after = torch.cat(tickets) if tickets else None
    return tree_map(lambda rows: rows_to_choices(passage.back(rows, after), pos_N, expert_ids_TK.numel()), answer)


def choices_of(expert_ids: Tensor, weights: Tensor, num_tokens: int, top_k: int) -> tuple[Tensor, Tensor]:
    """What a gate answers for so many tokens, both as `(T, K)`.

    Raises:
        ValueError: an answer of another size.
    """
    shape = num_tokens, top_k
    for name, got in (("top_k_idx", expert_ids), ("top_k_val", weights)):
        if got.numel() != num_tokens * top_k:
            raise ValueError(f"the gate must return {name} of {shape}, got {tuple(got.shape)}")
    return expert_ids.reshape(shape), weights.reshape(shape)
