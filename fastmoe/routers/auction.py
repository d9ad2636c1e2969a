"""Balanced assignment of tokens to experts by auction."""

import torch
from torch import Tensor

from fastmoe.routers.capacity import places_in_queues
from fastmoe.routers.serial import serve_in_turn
from fastmoe.routers.token_choice import count_rows

EPS = 1e-2
SCALING = 5.0
OUTLIER = 10.0


def balanced_assignment(scores_TE: Tensor, eps: float = EPS, max_rounds: int | None = None) -> Tensor:
    """The experts, int64 `(T,)`, for which the sum of scores is largest where each gets T/E tokens, rounded up or down.

    Bertsekas' auction (1992, "Auction algorithms for network flow problems"). A token bids for the expert of largest
    score less price: what that is better than its second best, and eps. An expert keeps its highest bids; the lowest
    of them is its price. eps falls from coarse to fine, each time from the prices reached. Where E does not divide T,
    bidders without a token, of whom an expert keeps one at most, fill the places that stay free.

    The sum is within `(T + E) * eps * range` of the largest, range being the largest difference between two scores of
    one token, or ten times the median of the tokens' ranges if that is less: what is farther below a token's best
    score counts as being so far, lest one token of huge scores coarsen all others' assignment.
    Deterministic. Every round waits for the device.

    Args:
        scores_TE: float32 or wider; NaN counts as 0.
        eps: relative to the range.
        max_rounds: in each pass; tokens then without an expert take, in their order, the best one with room.
            None: `100 + 20 * E`.
    """
    num_tokens, num_experts = scores_TE.shape
    if num_tokens == 0 or num_experts == 1:
        return torch.zeros(num_tokens, dtype=torch.int64, device=scores_TE.device)
    values_TE = _normalized(scores_TE.detach())
    rounds = 100 + 20 * num_experts if max_rounds is None else max_rounds
    prices_E = values_TE.new_zeros(num_experts)
    step = 1 / SCALING
    while step > eps:
        _, _, prices_E = _auction(values_TE, prices_E, step, rounds)
        step /= SCALING
    ids_T, bids_T, _ = _auction(values_TE, prices_E, eps, rounds)
    return _complete(values_TE, ids_T, bids_T)


def _normalized(scores_TE: Tensor) -> Tensor:
    """Scores less each token's largest, divided by the range: in -1..0."""
    halves_TE = scores_TE.nan_to_num() / 2  # so that no difference overflows
    below_TE = halves_TE - halves_TE.amax(dim=1, keepdim=True)
    ranges_T = -below_TE.amin(dim=1)
    typical = OUTLIER * ranges_T.median()
    limit = torch.where(typical > 0, torch.minimum(typical, ranges_T.max()), ranges_T.max())
    return (below_TE / limit.clamp(min=torch.finfo(below_TE.dtype).tiny)).clamp(min=-1)


def _auction(values_TE: Tensor, start_E: Tensor, eps: float, rounds: int) -> tuple[Tensor, Tensor, Tensor]:
    """One pass from the prices `start_E`: each token's expert (-1: none yet) and bid, and the prices reached.

    An expert has two prices: for tokens, and for bidders without a token (`free`), who must outbid the one it keeps.
    """
    num_tokens, num_experts = values_TE.shape
    size = -(-num_tokens // num_experts)
    num_free = size * num_experts - num_tokens
    ids_T = torch.full((num_tokens,), -1, dtype=torch.int64, device=values_TE.device)
    bids_T = values_TE.new_full((num_tokens,), -torch.inf)
    free_bids_E = values_TE.new_full((num_experts,), -torch.inf)
    prices_E = free_prices_E = start_E
    for _ in range(rounds):
        bidders_U = (ids_T < 0).nonzero().flatten()
        without = num_free - (free_bids_E > -torch.inf).sum()
        if len(bidders_U) == 0 and not bool(without):
            break
        best_U2, experts_U2 = (values_TE[bidders_U] - prices_E).topk(2, dim=1)
        ids_T[bidders_U] = experts_U2[:, 0]
        bids_T[bidders_U] = prices_E[experts_U2[:, 0]] + best_U2[:, 0] - best_U2[:, 1] + eps
        free_bids_E = torch.maximum(free_bids_E, _free_bids(free_prices_E, without, eps))
        places_T, counts_E = _places_by_bid(ids_T, bids_T, num_experts)
        beaten_by_E = _bid_at(size - 1, places_T, ids_T, bids_T, num_experts)
        free_bids_E = free_bids_E.masked_fill(free_bids_E <= beaten_by_E, -torch.inf)
        has_free_E = free_bids_E > -torch.inf
        room_E = size - has_free_E.long()
        ids_T = ids_T.masked_fill(places_T >= room_E[ids_T], -1)
        counts_E = torch.minimum(counts_E, room_E)
        lowest_E = _bid_at(counts_E[ids_T] - 1, places_T, ids_T, bids_T, num_experts)
        lowest_E = torch.where(counts_E > 0, lowest_E, torch.inf)
        lowest_E = torch.where(has_free_E, torch.minimum(lowest_E, free_bids_E), lowest_E)
        prices_E = torch.where(counts_E + has_free_E == size, lowest_E, start_E)
        free_prices_E = torch.where(has_free_E, free_bids_E, prices_E)
    return ids_T, bids_T, prices_E


def _free_bids(prices_E: Tensor, bidders: Tensor, eps: float) -> Tensor:
    """What bidders without a token offer: each for another of the cheapest experts, up to the next one's price."""
    sorted_E, order_E = prices_E.sort(stable=True)
    bids_E = torch.full_like(prices_E, -torch.inf)
    among_E = torch.arange(len(prices_E), device=prices_E.device) < bidders
    return bids_E.scatter(0, order_E, torch.where(among_E, sorted_E[bidders] + eps, -torch.inf))


def _places_by_bid(ids_T: Tensor, bids_T: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """Each token's place with its expert, highest bid first (T where it has none), and the tokens of each expert."""
    queues_T = torch.where(ids_T < 0, num_experts, ids_T)
    order_T = bids_T.argsort(descending=True, stable=True)
    sorted_T, counts_E = places_in_queues(queues_T[order_T], num_experts + 1)
    places_T = torch.empty_like(sorted_T).scatter_(0, order_T, sorted_T)
    return places_T.masked_fill(ids_T < 0, len(ids_T)), counts_E[:num_experts]


def _bid_at(place: int | Tensor, places_T: Tensor, ids_T: Tensor, bids_T: Tensor, num_experts: int) -> Tensor:
    """The bid of each expert's token at that place, -inf where there is none: `(E,)`."""
    found_E1 = bids_T.new_full((num_experts + 1,), -torch.inf)
    at_T = torch.where((places_T == place) & (ids_T >= 0), ids_T, num_experts)
    return found_E1.scatter(0, at_T, bids_T)[:num_experts]


def _complete(values_TE: Tensor, ids_T: Tensor, bids_T: Tensor) -> Tensor:
    """Give every token an expert where the auction ended early; an assignment that is balanced stays as it is."""
    num_tokens, num_experts = values_TE.shape
    places_T, counts_E = _places_by_bid(ids_T, bids_T, num_experts)
    fewest, larger = divmod(num_tokens, num_experts)
    largest_first_E = counts_E.argsort(descending=True, stable=True)
    room_E = torch.full_like(counts_E, fewest).index_add(
        0, largest_first_E[:larger], torch.ones_like(counts_E[:larger])
    )
    ids_T = ids_T.masked_fill(places_T >= room_E[ids_T], -1)
    rest_U = (ids_T < 0).nonzero().flatten()
    ids_T[rest_U] = serve_in_turn(values_TE[rest_U], room_E - count_rows(ids_T, num_experts))
    return ids_T
