"""The auction against the exact optimum and against an auction of one bid at a time."""

import itertools

import pytest
import torch

from fastmoe.routers.auction import EPS, balanced_assignment


def total(scores, ids):
    return sum(row[e] for row, e in zip(scores, ids, strict=True))


def optimum(scores, num_experts):
    """The largest sum, by dynamic programming over how many tokens each expert has."""
    fewest, larger = divmod(len(scores), num_experts)
    best = {(0,) * num_experts: 0.0}
    for row in scores:
        reached = {}
        for counts, value in best.items():
            for e in range(num_experts):
                more = (*counts[:e], counts[e] + 1, *counts[e + 1 :])
                if more[e] <= fewest + (larger > 0):
                    reached[more] = max(reached.get(more, -float("inf")), value + row[e])
        best = reached
    return max(value for counts, value in best.items() if min(counts) >= fewest)


def auction_by_single_bids(scores, num_experts, eps):
    """Bertsekas' auction for places: persons bid one at a time; those without a token may have one place an expert."""
    size = -(-len(scores) // num_experts)
    num_places = size * num_experts
    persons = [[row[place // size] for place in range(num_places)] for row in scores]
    spare = [0 if place % size == 0 else -1e6 for place in range(num_places)]
    persons += [spare] * (num_places - len(scores))
    prices, owner, waiting = [0.0] * num_places, {}, list(range(num_places))
    while waiting:
        person = waiting.pop()
        net = sorted(((persons[person][place] - prices[place], place) for place in range(num_places)), reverse=True)
        place = net[0][1]
        prices[place] += net[0][0] - net[1][0] + eps
        if place in owner:
            waiting.append(owner[place])
        owner[place] = person
    place_of = {person: place for place, person in owner.items()}
    return [place_of[t] // size for t in range(len(scores))]


def assert_balanced(ids_T, num_tokens, num_experts):
    assert ids_T.shape == (num_tokens,)
    fewest, larger = divmod(num_tokens, num_experts)
    counts = sorted(torch.bincount(ids_T, minlength=num_experts).tolist())
    assert counts == [fewest] * (num_experts - larger) + [fewest + 1] * larger


SHAPES = [(1, 1), (5, 1), (1, 4), (3, 5), (4, 4), (6, 3), (7, 3), (9, 4), (10, 4), (11, 2)]


@pytest.mark.parametrize(("num_tokens", "num_experts"), SHAPES)
def test_is_the_optimum(num_tokens, num_experts):
    """Sums of whole numbers differ by 1 at least: with so small an eps only the largest is near enough."""
    for highest in (1, 3, 30):
        scores_TE = torch.randint(highest + 1, (num_tokens, num_experts)).double()
        eps = 0.9 / ((num_tokens + num_experts) * highest)
        ids_T = balanced_assignment(scores_TE, eps, max_rounds=100_000)
        assert_balanced(ids_T, num_tokens, num_experts)
        scores = scores_TE.tolist()
        assert total(scores, ids_T.tolist()) == optimum(scores, num_experts)


def test_is_the_best_permutation():
    scores_TE = torch.randn(6, 6, dtype=torch.float64)
    best = max(itertools.permutations(range(6)), key=lambda ids: total(scores_TE.tolist(), ids))
    assert balanced_assignment(scores_TE, 1e-5, max_rounds=100_000).tolist() == list(best)


@pytest.mark.parametrize(("num_tokens", "num_experts"), [(16, 4), (18, 4), (3, 6), (21, 5)])
def test_is_an_auction(num_tokens, num_experts):
    scores_TE = torch.randint(11, (num_tokens, num_experts)).double() + torch.randint(6, (num_experts,))
    places = -(-num_tokens // num_experts) * num_experts
    scores = scores_TE.tolist()
    expected = auction_by_single_bids(scores, num_experts, 1 / (places + 1))
    ids_T = balanced_assignment(scores_TE, 0.9 / (places * 16), max_rounds=100_000)
    assert total(scores, ids_T.tolist()) == total(scores, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("num_tokens", "num_experts"), SHAPES)
def test_is_within_its_bound(num_tokens, num_experts, dtype):
    for scale, shift in ((1, 0), (1e30, 0), (1e-30, 0), (1, 100)):
        scores_TE = torch.randn(num_tokens, num_experts, dtype=dtype) * scale + shift
        ids_T = balanced_assignment(scores_TE)
        scores = scores_TE.tolist()
        span = max(max(row) - min(row) for row in scores)
        largest = optimum(scores, num_experts)
        least = largest - (num_tokens + num_experts) * EPS * span
        assert least - 1e-5 * abs(largest) <= total(scores, ids_T.tolist()) <= largest + 1e-5 * abs(largest)


HARD = {
    "equal": torch.zeros(37, 5),
    "constant": torch.full((37, 5), 1e38),
    "huge": torch.randn(37, 5) * 1e38,
    "extremes": torch.finfo(torch.float32).max * torch.randn(37, 5).sign(),
    "infinite": torch.tensor([-torch.inf, 0.0, 1.0, 2.0, torch.inf]).expand(37, 5),
    "nan": torch.full((37, 5), torch.nan),
    "tiny": torch.randn(37, 5) * 1e-44,
    "same_wishes": torch.arange(5.0).expand(37, 5),
    "one_far_off": torch.cat([torch.full((1, 5), 1e20), torch.randn(36, 5)]) * torch.arange(5.0),
    "near_twins": torch.arange(37.0).unsqueeze(1) * 1e-6 + torch.arange(5.0),
    "few_tokens": torch.randn(3, 20),
    "many_experts": torch.randn(200, 64),
    "no_token": torch.randn(0, 4),
    "one_expert": torch.randn(9, 1),
    "nothing": torch.randn(0, 1),
}


@pytest.mark.parametrize("max_rounds", [None, 0, 1, 5])
@pytest.mark.parametrize("scores_TE", HARD.values(), ids=HARD.keys())
def test_always_ends_balanced(scores_TE, max_rounds):
    before_TE = scores_TE.clone()
    ids_T = balanced_assignment(scores_TE, max_rounds=max_rounds)
    assert_balanced(ids_T, *scores_TE.shape)
    assert torch.equal(ids_T, balanced_assignment(scores_TE, max_rounds=max_rounds))
    assert torch.equal(scores_TE.nan_to_num(), before_TE.nan_to_num())


def test_without_rounds_tokens_choose_in_turn():
    scores_TE = torch.randn(13, 4)
    room, expected = [4, 3, 3, 3], []
    for row in scores_TE.tolist():
        expected.append(max((e for e in range(4) if room[e]), key=lambda e: row[e]))
        room[expected[-1]] -= 1
    assert balanced_assignment(scores_TE, max_rounds=0).tolist() == expected


def test_one_token_of_huge_scores_does_not_coarsen_the_others():
    torch.manual_seed(0)
    scores_TE = torch.randn(256, 8)
    means = []
    for factor in (1, 1000):
        scaled_TE = torch.cat([scores_TE[:1] * factor, scores_TE[1:]])
        ids_T = balanced_assignment(scaled_TE)
        means.append(scores_TE[1:].gather(1, ids_T[1:].unsqueeze(1)).mean().item())
        assert ids_T[0] == scores_TE[0].argmax()
    assert means[1] > 0.98 * means[0]
