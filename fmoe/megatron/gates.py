"""FastMoE's gates as routers of a `fastmoe.MoE`."""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

import fmoe.gates
from fastmoe._errors import unknown_name
from fastmoe._processes import Processes
from fastmoe.routers import Routing
from fmoe.functions import ensure_comm
from fmoe.gates import BaseGate, GShardGate, NaiveGate, NoisyGate, SwipeGate, SwitchGate
from fmoe.passage import choices_of

GateLike = str | Callable[..., nn.Module]

STRATEGIES: dict[str, type[BaseGate]] = {
    "naive": NaiveGate,
    "noisy": NoisyGate,
    "gshard": GShardGate,
    "switch": SwitchGate,
    "swipe": SwipeGate,
}


class GateRouter(nn.Module):
    """Asks a gate, and hands its balance loss over with its choices.

    Args:
        gate: `(T, D) -> (top_k_idx, top_k_val)`, as of `BaseGate`.
        num_experts, top_k: E and K of the layer.
        workers: the processes that hold different experts.
        aux_loss_weight: of the gate's balance loss.
    """

    def __init__(self, gate: nn.Module, num_experts: int, top_k: int, workers: Processes, aux_loss_weight: float):
        super().__init__()
        self.gate, self.num_experts, self.top_k = gate, num_experts, top_k
        self.workers, self.aux_loss_weight = workers, aux_loss_weight

    def forward(self, x_TD: Tensor) -> Routing:
        """Who goes where.

        Raises:
            ValueError: an answer of another size than `(T, K)`.
        """
        if self.workers.size > 1:
            ensure_comm(x_TD, self.workers.group)
        expert_ids, weights = self.gate(x_TD)
        expert_ids_TK, weights_TK = choices_of(expert_ids, weights, len(x_TD), self.top_k)
        return Routing.from_topk(expert_ids_TK, weights_TK, self.num_experts, self._losses())

    def _losses(self) -> dict[str, Tensor]:
        """The gate's loss; what `get_loss` still says of it has no graph, which would outlive the step."""
        gate = self.gate
        if not isinstance(gate, BaseGate) or (loss := gate.get_loss()) is None:
            return {}
        gate.set_loss(loss.detach())
        return {"load_balance": loss.reshape(()) * self.aux_loss_weight}


def router_of(gate: GateLike, workers: Processes, aux_loss_weight: float) -> Callable[[int, int, int], GateRouter]:
    """What `fastmoe.MoE(router=)` takes, for a gate that is made as `FMoE` makes it."""

    def make(d_model: int, num_experts: int, top_k: int) -> GateRouter:
        if num_experts % workers.size:
            raise ValueError(f"{num_experts} experts cannot be shared by {workers.size} workers")
        assert callable(gate)
        made = gate(d_model, num_experts // workers.size, workers.size, top_k)
        if isinstance(made, BaseGate):
            made.moe_group = workers.group
        return GateRouter(made, num_experts, top_k, workers, aux_loss_weight)

    return make


def choose_gate(gate: GateLike | None, balance_strategy: str | None) -> Callable[..., nn.Module]:
    """The gate's class: the one that is given, by itself or by its name, or that of the strategy; else `NaiveGate`.

    Raises:
        ValueError: an unknown name, or both arguments.
    """
    if gate is None:
        if (balance_strategy or "naive") not in STRATEGIES:
            raise unknown_name("balance_strategy", balance_strategy, STRATEGIES)
        return STRATEGIES[balance_strategy or "naive"]
    if balance_strategy is not None:
        raise ValueError(f"gate and balance_strategy={balance_strategy!r} both name a gate: give one of them")
    if not isinstance(gate, str):
        return gate
    named: dict[str, Any] = {name: getattr(fmoe.gates, name) for name in fmoe.gates.__all__ if name.endswith("Gate")}
    named = STRATEGIES | {name: cls for name, cls in named.items() if name not in ("BaseGate", "FasterGate")}
    if gate not in named:
        raise unknown_name("gate", gate, named)
    return named[gate]
