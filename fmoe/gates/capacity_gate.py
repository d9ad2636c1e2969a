"""What the gates with a capacity share."""

import torch
from torch import Tensor

from fastmoe._errors import check_number
from fastmoe._processes import ALONE, Processes
from fastmoe.routers import load_balance_loss, noise
from fastmoe.routers.capacity import expert_capacity, over_capacity
from fmoe.gates.naive_gate import NaiveGate


class CapacityGate(NaiveGate):
    """A gate whose experts take so many rows and no more; choices that find theirs full become -1.

    Experts serve first choices before second ones, and earlier tokens first.

    Args:
        d_model, num_expert, world_size, top_k, gate_bias: see `NaiveGate`.
        capacity: in training and in evaluation, how many times an even share one expert takes; rounded up.

    Raises:
        ValueError: a capacity that is not two numbers.
    """

    def __init__(
        self,
        d_model: int,
        num_expert: int,
        world_size: int,
        top_k: int,
        capacity: tuple[float, float],
        gate_bias: bool,
    ) -> None:
        super().__init__(d_model, num_expert, world_size, top_k=top_k, gate_bias=gate_bias)
        if not isinstance(capacity, tuple | list) or len(capacity) != 2:
            raise ValueError(f"capacity must be two numbers, for training and for evaluation, got {capacity!r}")
        self.capacity = check_number("capacity", capacity[0]), check_number("capacity", capacity[1])

    def rows_per_expert(self, num_tokens: int | Tensor) -> int | Tensor:
        """The capacity for so many tokens of one batch."""
        factor = self.capacity[0 if self.training else 1]
        return expert_capacity(num_tokens, self.tot_expert, self.top_k, factor)

    def prune(self, expert_ids_TK: Tensor, weights_TK: Tensor, processes: Processes = ALONE) -> Tensor:
        """`expert_ids_TK` with -1 for choices over the capacity of the batch of `processes`."""
        num_tokens = torch.tensor(len(expert_ids_TK), device=expert_ids_TK.device)
        capacity = self.rows_per_expert(processes.sum(num_tokens))
        over_TK = over_capacity(expert_ids_TK, weights_TK, self.tot_expert, capacity, processes=processes)
        return expert_ids_TK.masked_fill(over_TK, -1)

    def balance(self, shares_TE: Tensor, expert_ids_TK: Tensor) -> None:
        """Leave the balance loss of first choices, `E * sum of f_e * P_e` over the batch of all workers."""
        self.set_loss(load_balance_loss(shares_TE, expert_ids_TK[:, :1], processes=self.sharers()))


class TopTwoGate(CapacityGate):
    """The two best experts, weights the softmax over both; the loss of GShard.

    Args:
        d_model, num_expert, world_size, gate_bias: see `NaiveGate`.
        topk: 2.
        capacity: see `CapacityGate`.
        random_routing: in training, keep the second expert with probability min(1, 2 * its weight).

    Raises:
        ValueError: another `topk`.
    """

    def __init__(
        self,
        d_model: int,
        num_expert: int,
        world_size: int,
        topk: int = 2,
        capacity: tuple[float, float] = (1.2, 2.4),
        random_routing: bool = True,
        gate_bias: bool = True,
    ) -> None:
        if topk != 2:
            raise ValueError(f"{type(self).__name__} sends each token to two experts: topk must be 2, got {topk!r}")
        super().__init__(d_model, num_expert, world_size, 2, capacity, gate_bias)
        self.random_routing = random_routing

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        """Experts, best first, -1 where dropped, and weights, both `(T, 2)`."""
        logits_TE = self.gate(x)
        expert_ids_TK = logits_TE.topk(2, dim=1).indices
        weights_TK = self.weights(logits_TE, expert_ids_TK)
        self.balance(logits_TE.softmax(dim=1), expert_ids_TK)
        kept_TK = self.limit(expert_ids_TK, weights_TK.detach())
        return self._skip_second(kept_TK, weights_TK.detach()), weights_TK

    def limit(self, expert_ids_TK: Tensor, weights_TK: Tensor) -> Tensor:
        """`expert_ids_TK` with -1 for choices over the capacity."""
        raise NotImplementedError

    def _skip_second(self, expert_ids_TK: Tensor, weights_TK: Tensor) -> Tensor:
        if not (self.training and self.random_routing):
            return expert_ids_TK
        second_T = weights_TK[:, 1]
        skipped_T = 2 * second_T < noise.uniform(second_T)
        return torch.stack([expert_ids_TK[:, 0], expert_ids_TK[:, 1].masked_fill(skipped_T, -1)], dim=1)
