"""`FasterGate`: few tokens leave their node."""

import math
import os
from collections.abc import Callable

import torch
from torch import Tensor

from fastmoe._errors import check_int, check_number
from fastmoe.routers import load_balance_loss
from fmoe.gates.naive_gate import NaiveGate


class FasterGate(NaiveGate):
    """The two best experts, unless too many tokens would leave the node: the others take the two best of the node.

    The topology-aware gate of FasterMoE (He et al. 2022, PPoPP'22, doi 10.1145/3503221.3508418). A token leaves if one
    of its two best experts is in another node. Of T tokens in this worker `floor(outgoing_fraction * T)` may leave:
    those whose best expert elsewhere has the largest logit, earlier ones first. Weights as of `NaiveGate`, of the
    experts that a token got. The loss is that of `GShardGate`, of the experts that tokens would like best.

    Args:
        d_model, n_expert, world_size, gate_bias: see `NaiveGate`.
        node_rank: this worker's node; worker r of the `moe_group` is in node `r // workers_per_node`.
        workers_per_node: how many workers share a fast network; if None the environment's `FMOE_TOPO_GPUS_PER_NODE`,
            as in FastMoE, or 8.
        outgoing_fraction: from 0 to 1; if None the environment's `FMOE_TOPO_OUTGOING_FRACTION`, or 0.14.

    Raises:
        ValueError: an argument or a variable that does not fit; a node that is not there or has a single expert.
    """

    def __init__(
        self,
        d_model: int,
        n_expert: int,
        world_size: int,
        node_rank: int,
        gate_bias: bool = True,
        workers_per_node: int | None = None,
        outgoing_fraction: float | None = None,
    ) -> None:
        super().__init__(d_model, n_expert, world_size, top_k=2, gate_bias=gate_bias)
        per_node = n_expert * _workers_per_node(workers_per_node)
        self.node_rank = check_int("node_rank", node_rank, 0)
        self.home = range(self.tot_expert)[node_rank * per_node : (node_rank + 1) * per_node]
        self.outgoing_fraction = _outgoing_fraction(outgoing_fraction)
        if len(self.home) < 2:
            raise ValueError(
                f"a node must have 2 experts for tokens that stay, got {len(self.home)} in node {node_rank} of "
                f"{self.tot_expert} experts, {per_node} in a node"
            )

    def forward(self, inp: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        """Experts, best first, and weights, both `(T, 2)`."""
        logits_TE = self.gate(inp.reshape(-1, inp.shape[-1]))
        wanted_TK = logits_TE.topk(2, dim=1).indices
        self.set_loss(load_balance_loss(logits_TE.softmax(dim=1), wanted_TK[:, :1], processes=self.sharers()))
        near_TK = logits_TE[:, self.home.start : self.home.stop].topk(2, dim=1).indices + self.home.start
        expert_ids_TK = torch.where(self._leaving(logits_TE, wanted_TK).unsqueeze(1), wanted_TK, near_TK)
        return expert_ids_TK, self.weights(logits_TE, expert_ids_TK)

    def _leaving(self, logits_TE: Tensor, wanted_TK: Tensor) -> Tensor:
        """Which tokens get what they want, bool `(T,)`: those that may leave; if there are few, others too."""
        away_TK = (wanted_TK < self.home.start) | (wanted_TK >= self.home.stop)
        pull_T = logits_TE.detach().gather(1, wanted_TK).masked_fill(~away_TK, -math.inf).amax(dim=1)
        limit = math.floor(self.outgoing_fraction * len(pull_T) + 1e-9)  # 0.29 * 100 is below 29
        first = pull_T.argsort(descending=True, stable=True)[:limit]
        return torch.zeros_like(pull_T, dtype=torch.bool).index_fill(0, first, True)


def gen_faster_gate(
    rank: int, workers_per_node: int | None = None, outgoing_fraction: float | None = None
) -> Callable[..., FasterGate]:
    """`gate=` of a layer on worker `rank` of its `moe_group`; other arguments as of `FasterGate`.

    Raises:
        ValueError: by what it returns, for another `top_k` than 2, and as `FasterGate`.
    """

    def make(d_model: int, n_expert: int, world_size: int, top_k: int = 2) -> FasterGate:
        if top_k != 2:
            raise ValueError(f"FasterGate sends each token to two experts: top_k must be 2, got {top_k!r}")
        workers = _workers_per_node(workers_per_node)
        node = rank // workers
        return FasterGate(
            d_model, n_expert, world_size, node, workers_per_node=workers, outgoing_fraction=outgoing_fraction
        )

    return make


def _workers_per_node(given: int | None) -> int:
    if given is not None:
        return check_int("workers_per_node", given, 1)
    text = os.environ.get("FMOE_TOPO_GPUS_PER_NODE", "8")
    if not text.isdecimal() or int(text) < 1:
        raise ValueError(f"FMOE_TOPO_GPUS_PER_NODE must be a whole number >= 1, got {text!r}")
    return int(text)


def _outgoing_fraction(given: float | None) -> float:
    name, value = "outgoing_fraction", given
    if value is None:
        name, text = "FMOE_TOPO_OUTGOING_FRACTION", os.environ.get("FMOE_TOPO_OUTGOING_FRACTION", "0.14")
        try:
            value = float(text)
        except ValueError:
            raise ValueError(f"{name} must be a number from 0 to 1, got {text!r}") from None
    if check_number(name, value) > 1:
        raise ValueError(f"{name} must be a number from 0 to 1, got {value!r}")
    return value
