"""`SwitchGate`: one expert, a capacity over all workers."""

import torch
from torch import Tensor

from fastmoe.routers import noise
from fmoe.gates.capacity_gate import CapacityGate


class SwitchGate(CapacityGate):
    """Switch Transformer (Fedus et al. 2021, 2101.03961): the most probable expert, with its probability as weight.

    An expert takes `ceil(capacity * T / E)` rows for T tokens in all workers together, lower ranks first.

    Args:
        d_model, num_expert, world_size, gate_bias: see `NaiveGate`.
        topk: 1.
        switch_eps: in training what the gate sees is multiplied, element by element, by numbers uniform in
            [1 - switch_eps, 1 + switch_eps].
        capacity: see `CapacityGate`.

    Raises:
        ValueError: another `topk`.
    """

    def __init__(
        self,
        d_model: int,
        num_expert: int,
        world_size: int,
        topk: int = 1,
        switch_eps: float = 0.1,
        capacity: tuple[float, float] = (1.2, 2.4),
        gate_bias: bool = True,
    ) -> None:
        if topk != 1:
            raise ValueError(f"SwitchGate sends each token to one expert: topk must be 1, got {topk!r}")
        super().__init__(d_model, num_expert, world_size, 1, capacity, gate_bias)
        self.switch_eps = switch_eps

    def forward(self, inp: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        """The expert, -1 where dropped, and its weight, both `(T, 1)`."""
        seen_TD = inp
        if self.training and self.switch_eps:
            seen_TD = inp * (1 + self.switch_eps * (2 * noise.uniform(inp) - 1))
        logits_TE = self.gate(seen_TD)
        shares_TE = logits_TE.to(torch.promote_types(logits_TE.dtype, torch.float32)).softmax(dim=1)
        weights_T1, expert_ids_T1 = shares_TE.max(dim=1, keepdim=True)
        self.balance(shares_TE, expert_ids_T1)
        return self.prune(expert_ids_T1, weights_T1.detach(), self.sharers()), weights_T1.to(inp.dtype)
