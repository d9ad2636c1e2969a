"""Hash routing: a fixed table from vocabulary ids to experts."""

import math
import reprlib
from collections.abc import Sequence
from typing import Unpack

import torch
from torch import Tensor

from fastmoe._errors import check_int
from fastmoe.routers.base import register_router
from fastmoe.routers.context import RoutingContext
from fastmoe.routers.routing import Routing
from fastmoe.routers.token_choice import TokenChoiceOptions, TokenChoiceRouter


@register_router("hash")
class HashRouter(TokenChoiceRouter):
    """A token goes to the K experts that the table has for its vocabulary id, each with weight 1/K; nothing is learned.

    Roller et al. 2021 (2106.04426), sections 3.1 and 3.2. The table is balanced: each expert has as many ids as any
    other, or one more; with `token_counts`, ids go to the expert of the least count so far, the commonest id first
    ("balanced assignment"). The K experts of an id are different ones, and its k-th column balanced by itself.

    Where the layer is not called with `token_ids=`, `fastmoe.feed_token_ids(model, embedding)` brings it the ids.

    Args:
        d_model, num_experts, top_k: D, E, K.
        vocab_size: V; ids are 0..V-1.
        token_counts: how often each id occurs in the data, V numbers.
        seed: of the table.
        capacity_factor, eval_capacity_factor, min_capacity, drop_by, stats_scope: see `TokenChoiceRouter`.

    Buffers:
        table_VK: int64, each id's experts, saved with the model.

    Raises:
        ValueError: no `vocab_size`; an option that does not fit. On a CPU also an id outside of the vocabulary.
    """

    needs_token_ids = True
    has_proj = False
    table_VK: Tensor

    def __init__(
        self,
        d_model: int,
        num_experts: int,
        top_k: int = 1,
        *,
        vocab_size: int | None = None,
        token_counts: Sequence[float] | None = None,
        seed: int = 0,
        **options: Unpack[TokenChoiceOptions],
    ) -> None:
        super().__init__(d_model, num_experts, top_k, **options)
        if vocab_size is None:
            raise ValueError("router 'hash' needs vocab_size, the number of ids in the vocabulary")
        self.vocab_size = check_int("vocab_size", vocab_size, 1)
        self.seed = check_int("seed", seed, 0)
        self.token_counts = None if token_counts is None else _check_counts(token_counts, vocab_size)
        self.register_buffer("table_VK", self._make_table().to(torch.get_default_device()))

    def reset_parameters(self) -> None:
        """Write the table anew; it is the same."""
        self.table_VK.copy_(self._make_table())

    def forward(self, x_TD: Tensor, context: RoutingContext | None = None) -> Routing:
        context = context or RoutingContext()
        if context.token_ids_T is None:
            raise ValueError("router 'hash' goes by token ids: give them in the context")
        ids_T = context.token_ids_T.to(self.table_VK.device)
        if context.token_mask_T is not None:
            ids_T = torch.where(context.token_mask_T, ids_T, 0)  # padding may have an id outside of the vocabulary
        if ids_T.device.type == "cpu" and not torch.compiler.is_compiling():
            self._check(ids_T)
        expert_ids_TK = self.table_VK[ids_T]
        dtype = torch.promote_types(x_TD.dtype, torch.float32)
        weights_TK = torch.full(expert_ids_TK.shape, 1 / self.top_k, dtype=dtype, device=x_TD.device)
        return self.routing(expert_ids_TK, weights_TK, context)

    def _check(self, ids_T: Tensor) -> None:
        if ids_T.numel() and not 0 <= int(ids_T.min()) <= int(ids_T.max()) < self.vocab_size:
            low, high = int(ids_T.min()), int(ids_T.max())
            raise ValueError(f"token_ids must lie in 0..{self.vocab_size - 1} (vocab_size - 1), got {low}..{high}")

    def _make_table(self) -> Tensor:
        generator = torch.Generator("cpu").manual_seed(self.seed)
        if self.token_counts is not None:
            return self._by_frequency(self.token_counts, generator)
        V, E = self.vocab_size, self.num_experts
        order_V = torch.randperm(V, generator=generator, device="cpu")
        shifts_K = torch.randperm(E, generator=generator, device="cpu")[: self.top_k]
        table_VK = torch.empty(V, self.top_k, dtype=torch.int64, device="cpu")
        table_VK[order_V] = (torch.arange(V, device="cpu").unsqueeze(1) + shifts_K) % E
        return table_VK

    def _by_frequency(self, counts: list[float], generator: torch.Generator) -> Tensor:
        rank_E = torch.randperm(self.num_experts, generator=generator, device="cpu").tolist()
        loads = [[0.0] * self.num_experts for _ in range(self.top_k)]
        sizes = [[0] * self.num_experts for _ in range(self.top_k)]
        table: list[list[int]] = [[] for _ in range(self.vocab_size)]
        for token in sorted(range(self.vocab_size), key=lambda v: -counts[v]):
            for load, size in zip(loads, sizes, strict=True):
                free = (e for e in range(self.num_experts) if e not in table[token])
                expert = min(free, key=lambda e: (load[e], size[e], rank_E[e]))
                load[expert] += counts[token]
                size[expert] += 1
                table[token].append(expert)
        return torch.tensor(table, dtype=torch.int64, device="cpu")

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, vocab_size={self.vocab_size}, seed={self.seed}"


def _check_counts(token_counts: Sequence[float], vocab_size: int) -> list[float]:
    try:
        counts = [float(count) for count in token_counts]
    except (TypeError, ValueError, RuntimeError):
        counts = []
    if len(counts) != vocab_size or not all(0 <= count < math.inf for count in counts):
        raise ValueError(
            f"token_counts must be {vocab_size} finite numbers >= 0, one for each id, got {reprlib.repr(token_counts)}"
        )
    return counts
