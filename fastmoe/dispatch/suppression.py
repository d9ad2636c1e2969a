"""Duplicate suppression: a token travels once to each process where it has experts, however many they are."""

import torch
from torch import Tensor

from fastmoe.dispatch.exchange import Exchange
from fastmoe.dispatch.local import RoutedRows
from fastmoe.dispatch.parcels import Combine, Parcel, chunk_of, exchanges
from fastmoe.dispatch.spread import Spread
from fastmoe.kernels import Plan, accumulation_dtype


def pack_tokens(
    x_TD: Tensor, rows: RoutedRows, spread: Spread, chunks: int, place: str, backend: str
) -> tuple[list[Parcel], Combine, Tensor]:
    """As `pack_rows`, but one row sent for each token and process: which experts there, with what weights, goes along.

    Results come back as weighted sums, which are added up with weight 1.
    """
    T, P, device = len(x_TD), spread.processes.size, x_TD.device
    kept_N = (rows.expert_ids_N >= 0).nonzero().flatten()
    tokens_N, experts_N = rows.token_ids_N[kept_N], rows.expert_ids_N[kept_N]
    counts_E = torch.bincount(experts_N, minlength=spread.num_experts)
    each = max(len(spread.held_by(0)), 1)
    parcel_N = chunk_of(tokens_N, T, chunks) * P + experts_N // each
    code_M, row_N = torch.unique(parcel_N * max(T, 1) + tokens_N, return_inverse=True)
    order_N = row_N.argsort(stable=True)
    sent_M = torch.bincount(code_M // max(T, 1), minlength=chunks * P).view(chunks, P)
    sent_N = torch.bincount(parcel_N, minlength=chunks * P).view(chunks, P)
    sent_PC2 = torch.stack([sent_M, sent_N], 2).transpose(0, 1).contiguous()
    swap = Exchange(spread.processes, [1] * P, [1] * P, place)
    with torch.no_grad():
        came_PC2 = swap.send(sent_PC2)
    sent, came = torch.stack([sent_PC2, came_PC2]).tolist()
    tokens_M = code_M % max(T, 1)
    parcels, start_M, start_N = [], 0, 0
    for c in range(chunks):
        m_sent, n_sent = ([part[c][i] for part in sent] for i in (0, 1))
        m_came, n_came = ([part[c][i] for part in came] for i in (0, 1))
        of_N = order_N[start_N : start_N + sum(n_sent)]
        first_P = torch.tensor([start_M + sum(m_sent[:p]) for p in range(P)], device=device)
        ids_N2 = torch.stack([row_N[of_N] - first_P[experts_N[of_N] // each], experts_N[of_N] % each], 1)
        there, back = exchanges(spread, m_sent, m_came, place)
        rows_here, ticket = _send_along(ids_N2, rows.weights_N[kept_N[of_N]], spread, n_sent, n_came, m_came, place)
        parcels.append(Parcel(tokens_M[start_M : start_M + sum(m_sent)], there, back, rows_here, ticket))
        start_M, start_N = start_M + sum(m_sent), start_N + sum(n_sent)
    return parcels, _sum_up(tokens_M, x_TD, backend), counts_E


def _send_along(
    ids_N2: Tensor,
    weights_N: Tensor,
    spread: Spread,
    sent_P: list[int],
    came_P: list[int],
    rows_P: list[int],
    place: str,
) -> tuple[RoutedRows, Tensor]:
    """For the rows that come here: which of their experts, with what weights. `rows_P`: rows from each process."""
    exchange = Exchange(spread.processes, sent_P, came_P, place)
    with torch.no_grad():
        came_N2 = exchange.send(ids_N2)
    weights_N, ticket = Exchange(spread.processes, sent_P, came_P, place).start(weights_N).finish()
    device = came_N2.device
    first_P = torch.tensor([sum(rows_P[:p]) for p in range(len(rows_P))], device=device)
    first_N = first_P.repeat_interleave(torch.tensor(came_P, device=device), output_size=len(came_N2))
    return RoutedRows(came_N2[:, 0] + first_N, came_N2[:, 1], weights_N), ticket


def _sum_up(token_ids_M: Tensor, x_TD: Tensor, backend: str) -> Combine:
    num_rows, device = len(token_ids_M), x_TD.device
    plan = Plan(torch.arange(num_rows, device=device), torch.tensor([num_rows], dtype=torch.int32, device=device))
    ones_M = torch.ones(num_rows, dtype=accumulation_dtype(x_TD.dtype), device=device)
    return Combine(plan, token_ids_M, ones_M, backend)
