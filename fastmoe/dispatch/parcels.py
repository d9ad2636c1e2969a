"""What one process sends to the others, and what they must do with it."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from fastmoe import kernels
from fastmoe.dispatch.exchange import Exchange, Flight
from fastmoe.dispatch.local import RoutedRows
from fastmoe.dispatch.spread import Spread
from fastmoe.kernels import Plan


@dataclass(frozen=True)
class Combine:
    """How the results of all parcels, one after another, become each token's sum.

    Attributes:
        plan: where each routed row's result stands.
        token_ids_N, weights_N: of the routed rows.
    """

    plan: Plan
    token_ids_N: Tensor
    weights_N: Tensor
    backend: str

    def __call__(self, y_NO: Tensor, num_tokens: int) -> Tensor:
        rows_NO = F.pad(y_NO, (0, 0, 0, len(self.token_ids_N) - len(y_NO)))
        return kernels.combine(rows_NO, self.token_ids_N, self.weights_N, self.plan, num_tokens, backend=self.backend)


@dataclass(frozen=True)
class Parcel:
    """One chunk of the tokens.

    Attributes:
        token_ids_M: the token of each row that is sent, by the process that it goes to.
        there, back: the exchanges that take rows to their experts, and results back.
        rows: what came here must go to which experts; tokens are rows of what was received.
        after: the ticket of an exchange that brought a part of `rows`; see `Flight.finish`.
    """

    token_ids_M: Tensor
    there: Exchange
    back: Exchange
    rows: RoutedRows
    after: Tensor | None = None

    def send(self, x_TD: Tensor) -> Flight:
        return self.there.start(x_TD.index_select(0, self.token_ids_M), self.after)


def chunk_of(token_ids_N: Tensor, num_tokens: int, chunks: int) -> Tensor:
    return token_ids_N * chunks // max(num_tokens, 1)


def pack_rows(
    x_TD: Tensor, rows: RoutedRows, spread: Spread, chunks: int, place: str, backend: str
) -> tuple[list[Parcel], Combine, Tensor]:
    """A parcel for each chunk, one row sent for each routed row; and rows for each expert of the layer, `(E,)`."""
    E = spread.num_experts
    keys_N = rows.expert_ids_N
    if chunks > 1:
        chunk_N = chunk_of(rows.token_ids_N, len(x_TD), chunks)
        keys_N = torch.where(keys_N < 0, -1, chunk_N * E + keys_N)
    plan = kernels.plan(keys_N, chunks * E, backend=backend)
    counts_EC = plan.counts_E.view(chunks, E).t().contiguous()
    came_PeC = swap_counts(counts_EC, spread, place)
    numbers = torch.cat([counts_EC.flatten(), came_PeC.flatten()]).tolist()
    sent_EC = [numbers[e * chunks : (e + 1) * chunks] for e in range(E)]
    came = torch.tensor(numbers[E * chunks :], dtype=torch.int64).view(came_PeC.shape)
    sizes = [sum(row[c] for row in sent_EC) for c in range(chunks)]
    order_M = plan.order_N[: sum(sizes)].split(sizes)
    parcels = []
    for c in range(chunks):
        sent_P = [sum(sent_EC[e][c] for e in spread.held_by(p)) for p in range(spread.processes.size)]
        received_P = came[:, :, c].sum(1).tolist()
        there, back = exchanges(spread, sent_P, received_P, place)
        rows_here = _whole_rows(came_PeC[:, :, c], sum(received_P), x_TD)
        parcels.append(Parcel(rows.token_ids_N[order_M[c]], there, back, rows_here))
    return parcels, Combine(plan, rows.token_ids_N, rows.weights_N, backend), counts_EC.sum(1)


def _whole_rows(counts_Pe: Tensor, num_rows: int, x_TD: Tensor) -> RoutedRows:
    """Received rows stand by process, then expert; each goes to one expert, with weight 1."""
    experts_Pe = torch.arange(counts_Pe.shape[1], device=x_TD.device).expand_as(counts_Pe)
    ids_R = experts_Pe.reshape(-1).repeat_interleave(counts_Pe.reshape(-1), output_size=num_rows)
    return RoutedRows.one_each(ids_R, x_TD.dtype)


def swap_counts(counts_EC: Tensor, spread: Spread, place: str) -> Tensor:
    """From how many rows go to each expert, how many come from each process to each expert here: `(P, e, C)`."""
    held, size = len(spread.held), spread.processes.size
    exchange = Exchange(spread.processes, spread.sizes_P, [held] * size, place)
    with torch.no_grad():
        return exchange.send(counts_EC).view(size, held, counts_EC.shape[1])


def exchanges(spread: Spread, sent_P: list[int], received_P: list[int], place: str) -> tuple[Exchange, Exchange]:
    return Exchange(spread.processes, sent_P, received_P, place), Exchange(spread.processes, received_P, sent_P, place)
