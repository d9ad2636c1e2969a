"""Capacity: how many rows one expert takes, and which rows go without."""

import math
from fractions import Fraction

import torch
from torch import Tensor

from fastmoe._processes import ALONE, Processes

DROP_BY = ("position", "weight")


def expert_capacity(
    num_tokens: int | Tensor, num_experts: int, top_k: int, factor: float, min_capacity: int = 0
) -> int | Tensor:
    """`max(ceil(factor * T * K / E), min_capacity)`, exact: the factor is taken as the nearest fraction to six digits.

    Args:
        num_tokens: T, of the whole batch; an int, or an int64 tensor, which gives a tensor without waiting for it.
    """
    ratio = Fraction(min(factor, num_experts)).limit_denominator(1_000_000)  # a factor of E has room for all rows
    rows = num_tokens * (ratio.numerator * top_k)
    capacity = -(-rows // (ratio.denominator * num_experts))
    if isinstance(capacity, Tensor):
        return capacity.clamp(min=min_capacity)
    return max(capacity, min_capacity)


def over_capacity(
    expert_ids_TK: Tensor,
    weights_TK: Tensor,
    num_experts: int,
    capacity: int | Tensor,
    *,
    by: str = "position",
    processes: Processes = ALONE,
) -> Tensor:
    """Which choices find their expert full: bool `(T, K)`. Nothing waits for the device on one process.

    "position": an expert serves first choices before second ones, and among those earlier tokens first (GShard,
    Lepikhin et al. 2020, 2006.16668, algorithm 1). "weight": it serves larger weights first (V-MoE's batch
    prioritised routing, Riquelme et al. 2021, 2106.05974, section 2.3, row by row); equal ones by position.

    Args:
        expert_ids_TK: int64; -1 takes no place and is never over capacity.
        weights_TK: same shape.
        capacity: rows of the whole batch that one expert takes.
        processes: those that share the batch.
    """
    if by == "weight":
        return _over_by_weight(expert_ids_TK, weights_TK, num_experts, capacity, processes)
    num_tokens, top_k = expert_ids_TK.shape
    ids_KT = expert_ids_TK.t()
    choice_K1 = torch.arange(top_k, device=ids_KT.device).unsqueeze(1)
    no_one = top_k * num_experts
    queues_N = torch.where(ids_KT < 0, no_one, choice_K1 * num_experts + ids_KT).reshape(-1)
    places_N, counts_Q = places_in_queues(queues_N, no_one + 1)
    counts_KE = counts_Q[:no_one].view(top_k, num_experts)
    all_KE, lower_KE = counts_KE, torch.zeros_like(counts_KE)
    if processes.size > 1:
        gathered_PKE = processes.gather(counts_KE)
        all_KE, lower_KE = gathered_PKE.sum(0), gathered_PKE[: processes.rank].sum(0)
    ahead_KE = all_KE.cumsum(0) - all_KE + lower_KE
    ahead_Q = torch.cat([ahead_KE.reshape(-1), ahead_KE.new_zeros(1)])
    over_N = (ahead_Q[queues_N] + places_N >= capacity) & (queues_N < no_one)
    return over_N.view(top_k, num_tokens).t()


def _over_by_weight(
    expert_ids_TK: Tensor, weights_TK: Tensor, num_experts: int, capacity: int | Tensor, processes: Processes
) -> Tensor:
    ids_GK, mine = processes.gather_rows(expert_ids_TK)
    weights_GK, _ = processes.gather_rows(weights_TK)
    top_k = ids_GK.shape[1]
    ids_N = torch.where(ids_GK < 0, num_experts, ids_GK).t().reshape(-1)
    by_weight_N = weights_GK.t().reshape(-1).argsort(descending=True, stable=True)
    places_N, _ = places_in_queues(ids_N[by_weight_N], num_experts + 1)
    over_N = torch.empty_like(places_N, dtype=torch.bool)
    over_N[by_weight_N] = places_N >= capacity
    over_N &= ids_N < num_experts
    return over_N.view(top_k, -1).t()[mine]


def places_in_queues(queues_N: Tensor, num_queues: int) -> tuple[Tensor, Tensor]:
    """Each row's place in its queue, from 0 in the order given, and the length of each queue."""
    sorted_N, order_N = queues_N.sort(stable=True)
    counts_Q = torch.zeros(num_queues, dtype=torch.int64, device=queues_N.device)
    counts_Q.scatter_add_(0, queues_N, torch.ones_like(queues_N))
    starts_Q = counts_Q.cumsum(0) - counts_Q
    rank_N = torch.arange(len(queues_N), device=queues_N.device) - starts_Q[sorted_N]
    return torch.empty_like(rank_N).scatter_(0, order_N, rank_N), counts_Q


def is_limit(factor: float | None) -> bool:
    """Whether a capacity factor limits anything: None and infinity do not."""
    return factor is not None and math.isfinite(factor)
