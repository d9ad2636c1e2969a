"""`Routing`: what a router returns."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import ClassVar

import torch
from torch import Tensor


@dataclass(frozen=True)
class Routing:
    """Who goes where, with what weight. Flat rows, so that token choice and expert choice are one form.

    Attributes:
        token_ids_N: int64, the token of each routed row, in 0..num_tokens-1.
        expert_ids_N: int64, its expert, in 0..num_experts-1; -1 for a row that was dropped and goes nowhere.
        weights_N: floating, the weight of the expert's output in the token's sum; differentiable.
        num_tokens: T.
        num_experts: E, of the whole layer.
        losses: balance losses by name; scalars, already weighted, with gradient.
        scores_TE: the router's scores, for statistics only; or None.
        dropped: how many choices were dropped for lack of capacity: int, or an int tensor of no dimension.
        demand_E: int64, how many rows chose each expert before some were dropped; None where none can be.
        rows_per_token: K if rows stand token by token, K for each; else 0. It only makes kernels faster.
    """

    token_ids_N: Tensor
    expert_ids_N: Tensor
    weights_N: Tensor
    num_tokens: int
    num_experts: int
    losses: Mapping[str, Tensor] = field(default_factory=dict)
    scores_TE: Tensor | None = None
    dropped: int | Tensor = 0
    demand_E: Tensor | None = None
    rows_per_token: int = 0

    @classmethod
    def from_topk(
        cls,
        expert_ids_TK: Tensor,
        weights_TK: Tensor,
        num_experts: int,
        losses: Mapping[str, Tensor] | None = None,
        scores: Tensor | None = None,
    ) -> "Routing":
        """Token choice: each token's K experts and their weights.

        Args:
            expert_ids_TK: int64; -1 where a choice was dropped.
            weights_TK: floating, same shape.
            num_experts: E.
            losses: weighted balance losses by name.
            scores: `(T, E)`, for statistics.

        Raises:
            ValueError: the two tensors' shapes differ, or are not `(T, K)`.
        """
        if expert_ids_TK.dim() != 2 or weights_TK.shape != expert_ids_TK.shape:
            raise ValueError(
                f"a router's expert ids and weights must both be (T, K); "
                f"ids are {tuple(expert_ids_TK.shape)}, weights are {tuple(weights_TK.shape)}"
            )
        num_tokens, top_k = expert_ids_TK.shape
        tokens_T1 = torch.arange(num_tokens, device=expert_ids_TK.device).unsqueeze(1)
        return cls(
            token_ids_N=tokens_T1.expand(-1, top_k).reshape(-1),
            expert_ids_N=expert_ids_TK.reshape(-1),
            weights_N=weights_TK.reshape(-1),
            num_tokens=num_tokens,
            num_experts=num_experts,
            losses=losses or {},
            scores_TE=scores,
            dropped=(expert_ids_TK == -1).sum(),
            rows_per_token=top_k,
        )

    def masked(self, token_mask_T: Tensor) -> "Routing":
        """The same with the rows of False tokens dropped, though not counted as such."""
        return replace(self, expert_ids_N=torch.where(token_mask_T[self.token_ids_N], self.expert_ids_N, -1))


@dataclass(frozen=True)
class SoftRouting:
    """Every slot of every expert takes a weighted mean of a sequence's tokens, every token one of its slots' outputs.

    Attributes:
        dispatch_BSL: floating, the weight of token s in the input of slot l, for B sequences of S tokens; slots stand
            expert by expert, L = E * p; differentiable.
        combine_BSL: floating, the weight of slot l's output in the output of token s; differentiable.
        num_tokens: T = B * S.
        num_experts: E, of the whole layer.
        slots_per_expert: p.
        losses, dropped, demand_E: as of a `Routing` without losses and capacity, for who watches both kinds.
    """

    losses: ClassVar[Mapping[str, Tensor]] = MappingProxyType({})
    dropped: ClassVar[int] = 0
    demand_E: ClassVar[None] = None
    dispatch_BSL: Tensor
    combine_BSL: Tensor
    num_tokens: int
    num_experts: int
    slots_per_expert: int

    @property
    def scores_TE(self) -> Tensor:
        """The weight of each expert's slots together in each token's output, for statistics."""
        combine_TEp = self.combine_BSL.reshape(self.num_tokens, self.num_experts, self.slots_per_expert)
        return combine_TEp.sum(2)

    def masked(self, token_mask_T: Tensor) -> "SoftRouting":
        """The same where False tokens get nothing from any slot."""
        mask_BS1 = token_mask_T.view(*self.combine_BSL.shape[:2], 1)
        return replace(self, combine_BSL=torch.where(mask_BS1, self.combine_BSL, 0))


def check_routing(
    routing: object, num_tokens: int, num_experts: int, *, check_ids: bool = True, check_finite: bool = True
) -> None:
    """Raise `ValueError` unless a router's answer fits the layer that asked.

    Shapes and dtypes are always checked, and on a CPU the token ids; kernels find bad expert ids there by themselves.
    `check_ids` asks for token and expert ids in range, `check_finite` for finite weights, scores and losses; both look
    at the numbers, which on a GPU waits for the device.
    """
    if not isinstance(routing, Routing | SoftRouting):
        raise ValueError(f"a router must return a fastmoe.Routing, got {type(routing).__name__}")
    if (routing.num_tokens, routing.num_experts) != (num_tokens, num_experts):
        raise ValueError(
            f"the layer has {num_tokens} tokens and {num_experts} experts, "
            f"the router answered for {routing.num_tokens} and {routing.num_experts}"
        )
    if isinstance(routing, SoftRouting):
        _check_soft(routing, check_finite)
        return
    rows = (len(routing.token_ids_N),)
    for name, tensor in (("token_ids_N", routing.token_ids_N), ("expert_ids_N", routing.expert_ids_N)):
        if tensor.shape != rows or tensor.dtype != torch.int64:
            raise ValueError(f"a router's {name} must be int64 {rows}, got {tensor.dtype} {tuple(tensor.shape)}")
    if routing.weights_N.shape != rows or not routing.weights_N.is_floating_point():
        raise ValueError(
            f"a router's weights must be floating {rows}, one for each routed row; "
            f"got {routing.weights_N.dtype} {tuple(routing.weights_N.shape)}"
        )
    if routing.rows_per_token * num_tokens not in (0, rows[0]):
        raise ValueError(f"{rows[0]} rows are not {routing.rows_per_token} for each of {num_tokens} tokens")
    _check_losses_and_scores(routing)
    if check_ids:
        _check_range("expert ids", routing.expert_ids_N, -1, num_experts)
    if check_ids or (routing.token_ids_N.device.type == "cpu" and not torch.compiler.is_compiling()):
        _check_token_ids(routing)
    if check_finite:
        named = {"weights": routing.weights_N, "scores": routing.scores_TE}
        _check_finite(named | {f"{name} loss": loss for name, loss in routing.losses.items()})


def _check_soft(routing: SoftRouting, check_finite: bool) -> None:
    num_slots = routing.num_experts * routing.slots_per_expert
    named = {"dispatch weights": routing.dispatch_BSL, "combine weights": routing.combine_BSL}
    for name, weights in named.items():
        fits = weights.dim() == 3 and weights.shape[2] == num_slots and weights[..., 0].numel() == routing.num_tokens
        if not fits or weights.shape != routing.dispatch_BSL.shape or not weights.is_floating_point():
            raise ValueError(
                f"a router's {name} must be floating (B, S, {num_slots}), one for each slot, of {routing.num_tokens} "
                f"tokens in B sequences; got {weights.dtype} {tuple(weights.shape)}"
            )
    if check_finite:
        _check_finite(named)


def _check_losses_and_scores(routing: Routing) -> None:
    for name, loss in routing.losses.items():
        if not isinstance(loss, Tensor) or loss.dim() != 0:
            got = tuple(loss.shape) if isinstance(loss, Tensor) else repr(loss)
            raise ValueError(f"a router's losses must be tensors of no dimension, got {got} for {name!r}")
    expected = (routing.num_tokens, routing.num_experts)
    if routing.scores_TE is not None and routing.scores_TE.shape != expected:
        raise ValueError(f"a router's scores must be {expected}, got {tuple(routing.scores_TE.shape)}")


def _check_token_ids(routing: Routing) -> None:
    if not routing.rows_per_token:
        _check_range("token ids", routing.token_ids_N, 0, routing.num_tokens)
        return
    rows_TK = routing.token_ids_N.view(routing.num_tokens, routing.rows_per_token)
    if not torch.equal(rows_TK, torch.arange(len(rows_TK), device=rows_TK.device).unsqueeze(1).expand_as(rows_TK)):
        raise ValueError(f"rows_per_token={routing.rows_per_token}, but the rows do not stand token by token")


def _check_finite(named: Mapping[str, Tensor | None]) -> None:
    for name, tensor in named.items():
        if tensor is not None and not bool(torch.isfinite(tensor).all()):
            bad = int((~torch.isfinite(tensor)).sum())
            raise ValueError(
                f"the router's {name} must be finite; {bad} of {tensor.numel()} values are NaN or infinite"
            )


def _check_range(name: str, ids_N: Tensor, low: int, high: int) -> None:
    if ids_N.numel() and not bool(((ids_N >= low) & (ids_N < high)).all()):
        raise ValueError(
            f"the router's {name} must lie in {low}..{high - 1}, got {int(ids_N.min())}..{int(ids_N.max())}"
        )
