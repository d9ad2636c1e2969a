"""Capacity: how many rows an expert takes, and who goes without, against slow loops."""

import math
from fractions import Fraction

import pytest
import torch

import fastmoe
from fastmoe.routers.capacity import expert_capacity, over_capacity


@pytest.mark.parametrize("factor", ["0.1", "0.7", "1", "1.1", "1.25", "2.3"])
@pytest.mark.parametrize("min_capacity", [0, 4])
def test_expert_capacity_is_exact(factor, min_capacity):
    for num_tokens in (0, 1, 7, 40, 1000):
        for num_experts, top_k in ((8, 2), (3, 1), (5, 5)):
            exact = math.ceil(Fraction(factor) * num_tokens * top_k / num_experts)
            arguments = (num_experts, top_k, float(factor), min_capacity)
            assert expert_capacity(num_tokens, *arguments) == max(exact, min_capacity)
            assert expert_capacity(torch.tensor(num_tokens), *arguments).item() == max(exact, min_capacity)


def test_eleven_tenths_of_ten_is_eleven():
    assert expert_capacity(40, 8, 2, 1.1) == 11


def served_in_order(rows, ids, capacity):
    taken, over = {}, [[False] * len(row) for row in ids]
    for t, k in rows:
        expert = ids[t][k]
        if expert >= 0:
            over[t][k] = taken.get(expert, 0) >= capacity
            taken[expert] = taken.get(expert, 0) + 1
    return over


@pytest.mark.parametrize("by", ["position", "weight"])
@pytest.mark.parametrize("equal", [False, True])
@pytest.mark.parametrize("num_tokens", [0, 1, 23])
def test_over_capacity(by, equal, num_tokens):
    for top_k in (1, 3):
        ids_TK = torch.rand(num_tokens, 5).argsort(1)[:, :top_k]
        ids_TK = ids_TK.masked_fill(torch.rand(num_tokens, top_k) < 0.2, -1)
        weights_TK = torch.ones(num_tokens, top_k) if equal else torch.rand(num_tokens, top_k)
        rows = [(t, k) for k in range(top_k) for t in range(num_tokens)]
        if by == "weight":
            rows.sort(key=lambda row: -weights_TK[row].item())
        for capacity in (0, 1, 4, 100):
            expected = served_in_order(rows, ids_TK.tolist(), capacity)
            assert over_capacity(ids_TK, weights_TK, 5, capacity, by=by).tolist() == expected
            assert over_capacity(ids_TK, weights_TK, 5, torch.tensor(capacity), by=by).tolist() == expected


def layer_of_one_queue(**options):
    """Every token prefers expert 0, which takes 2 rows of 8 tokens."""
    options = {"capacity_factor": 0.5, "aux_loss_weight": 0.0} | options
    layer = fastmoe.MoE(3, 2, 1, d_hidden=4, router_options=options).double()
    layer.router.proj.weight.data = torch.tensor([[1.0, 1.0, 1.0], [-1.0, -1.0, -1.0]], dtype=torch.float64)
    return layer


def test_dropped_tokens_get_zero_and_no_gradient():
    layer, x = layer_of_one_queue(), torch.rand(8, 3, dtype=torch.float64, requires_grad=True)
    y = layer(x)
    y.square().sum().backward()
    for got in (y, x.grad):
        assert (got[:2] != 0).any(1).all()
        assert not got[2:].any()
    assert int(fastmoe.stats(layer)[""].dropped) == 6


def test_largest_weights_are_served_first():
    x = torch.tensor([1, 3, 2, 4, 1, 1, 1, 1], dtype=torch.float64).unsqueeze(1).expand(8, 3) / 4
    assert layer_of_one_queue(drop_by="weight")(x).any(1).nonzero().flatten().tolist() == [1, 3]


def test_padding_takes_no_capacity():
    """Half the tokens are padding and stand first: an expert takes 1 row of the other 4, the first."""
    mask = torch.tensor([False] * 4 + [True] * 4)
    layer = layer_of_one_queue()
    assert layer(torch.rand(8, 3, dtype=torch.float64), mask).any(1).nonzero().flatten().tolist() == [4]
    assert int(fastmoe.stats(layer)[""].dropped) == 3


def test_evaluation_has_its_own_factor():
    layer = layer_of_one_queue(eval_capacity_factor=math.inf).eval()
    assert layer(torch.rand(8, 3, dtype=torch.float64)).any(1).all()


@pytest.mark.parametrize("factor", [8.0, 1e30])
@pytest.mark.parametrize("num_tokens", [10, torch.tensor(10)])
def test_no_expert_needs_room_for_more_than_all_rows(num_tokens, factor):
    assert int(expert_capacity(num_tokens, 8, 2, factor)) == 20
