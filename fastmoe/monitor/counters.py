"""`LayerCounters`: what one layer's training passes did, summed on its device."""

from typing import Any, Protocol

import torch
from torch import Tensor

from fastmoe._backward import in_backward
from fastmoe.monitor.stats import LayerStats

SUMS = ("passes", "tokens", "unrouted", "dropped", "rows", "weight", "entropy", "scored_tokens")


class Layer(Protocol):
    """What is asked of a layer: `fastmoe.MoE` has it."""

    training: bool
    num_experts: int
    last_stats: LayerStats | None


class LayerCounters:
    """Observes a layer. Sums stay on the device, in tensors allocated once; nothing waits for them.

    Passes in evaluation mode are not counted, nor is a pass that activation checkpointing runs again in backward.

    Attributes:
        counts_E: rows that each expert computed; demand_E: rows that chose it, before drops.
        last_E: number of the pass in which the expert last had a row, counted from 1; 0 is never. Like `pass_number`
            it is of the layer's whole life, not of a window.
        sums: by name in `SUMS`; losses: balance losses by name; each `(1,)`, since a compiled pass does not update
            tensors of no dimension that it finds here.
    """

    def __init__(self, layer: Layer, device: torch.device) -> None:
        self.layer = layer
        exact = torch.float32 if device.type == "mps" else torch.float64
        self.counts_E, self.demand_E, self.last_E = (
            torch.zeros(layer.num_experts, dtype=torch.int64, device=device) for _ in range(3)
        )
        self.pass_number = torch.zeros(1, dtype=torch.int64, device=device)
        self.sums = {name: torch.zeros(1, dtype=exact, device=device) for name in SUMS}
        self.losses: dict[str, Tensor] = {}

    def observe(self, routing: Any, offsets_E: Tensor, token_mask_T: Tensor | None) -> None:
        """Add a pass; `routing` is a `fastmoe.Routing`, or a soft one, which has slots in place of weighted rows."""
        if not self.layer.training or in_backward():
            return
        if offsets_E.device != self.pass_number.device:
            self._move(offsets_E.device)
        counts_E = torch.diff(offsets_E, prepend=offsets_E.new_zeros(1))
        self.counts_E.add_(counts_E)
        self.demand_E.add_(counts_E if routing.demand_E is None else routing.demand_E)
        self.pass_number.add_(1)
        self.last_E.copy_(torch.where(counts_E > 0, self.pass_number, self.last_E))
        tokens = routing.num_tokens if token_mask_T is None else token_mask_T.sum()
        self._add(passes=1, tokens=tokens, dropped=routing.dropped)
        if hasattr(routing, "expert_ids_N"):
            self._add(rows=offsets_E[-1])
            self._add_rows(routing, tokens)
        stats = self.layer.last_stats
        if stats is not None and stats.mean_entropy is not None:
            self._add(entropy=stats.mean_entropy * tokens, scored_tokens=tokens)
        for name, loss in routing.losses.items():
            if name not in self.losses:
                self.losses[name] = torch.zeros_like(self.sums["passes"])
            self.losses[name].add_(loss.detach())

    def _add_rows(self, routing: Any, tokens: int | Tensor) -> None:
        kept_N = routing.expert_ids_N >= 0
        if routing.rows_per_token:
            routed_T = kept_N.view(routing.num_tokens, routing.rows_per_token).any(1)
        else:
            rows_T = torch.zeros(routing.num_tokens, dtype=torch.int32, device=kept_N.device)
            routed_T = rows_T.index_add_(0, routing.token_ids_N, kept_N.int()) > 0
        weights_N = torch.where(kept_N, routing.weights_N.detach(), 0)
        self._add(unrouted=tokens - routed_T.sum(), weight=weights_N.sum(dtype=self.sums["weight"].dtype))

    def _add(self, **values: float | Tensor) -> None:
        for name, value in values.items():
            self.sums[name].add_(value)

    def _move(self, device: torch.device) -> None:
        """Follow a model that was moved after the monitor was attached."""
        self.counts_E, self.demand_E, self.last_E, self.pass_number = (
            tensor.to(device) for tensor in (self.counts_E, self.demand_E, self.last_E, self.pass_number)
        )
        self.sums = {name: value.to(device) for name, value in self.sums.items()}
        self.losses = {name: value.to(device) for name, value in self.losses.items()}

    def start_window(self) -> None:
        """Set everything to 0 but the passes since each expert last had a row."""
        for tensor in (self.counts_E, self.demand_E, *self.sums.values(), *self.losses.values()):
            tensor.zero_()

    def flat(self, loss_names: list[str]) -> Tensor:
        """`counts_E`, `demand_E`, the sums and the named losses in one vector, to be summed over processes."""
        zero = torch.zeros_like(self.sums["passes"])
        scalars = [*self.sums.values(), *(self.losses.get(name, zero) for name in loss_names)]
        return torch.cat([self.counts_E.to(zero.dtype), self.demand_E.to(zero.dtype), *scalars])

    def ages(self) -> Tensor:
        """`pass_number` and `last_E` in one vector."""
        return torch.cat([self.pass_number, self.last_E])
