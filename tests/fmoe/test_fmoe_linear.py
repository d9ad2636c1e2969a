"""`FMoELinear` against one product per expert."""

import plain_loops
import pytest
import torch
from helpers import assert_same

import fmoe


@pytest.mark.parametrize("counts", [[2, 0, 4], [0, 0, 0], [6, 0, 0], [5], [0]])
@pytest.mark.parametrize("bias", [True, False])
def test_against_a_loop(counts, bias):
    linear = fmoe.FMoELinear(len(counts), 5, 4, bias=bias).double()
    if bias:
        torch.nn.init.normal_(linear.bias)

    def loop(rows):
        parts = [part @ w.T for part, w in zip(rows.split(counts), linear.weight, strict=True)]
        return torch.cat([part + linear.bias[e] if bias else part for e, part in enumerate(parts)])

    rows = torch.randn(sum(counts), 5, dtype=torch.float64)
    for given in (counts, torch.tensor(counts)):
        got = plain_loops.outcome(lambda rows, given=given: linear(rows, given), linear, rows)
        assert_same(got, plain_loops.outcome(loop, linear, rows))


@pytest.mark.parametrize("num_expert", [1, 2])
def test_rows_of_another_width(num_expert):
    with pytest.raises(ValueError, match=r"weight must be \(E, O, 6\)"):
        fmoe.FMoELinear(num_expert, 5, 4)(torch.randn(2, 6), [2, 0][:num_expert])


def test_rows_take_the_dtype_of_the_weights():
    assert fmoe.FMoELinear(1, 3, 2).double()(torch.randn(4, 3), [4]).dtype == torch.float64


def test_initial_weights_are_those_of_a_linear_layer():
    weight = fmoe.FMoELinear(4, 64, 256).weight
    assert 0.99 / 8 < weight.abs().max().item() <= 1 / 8
    assert not fmoe.FMoELinear(4, 64, 256).bias.any()


@pytest.mark.parametrize(
    ("counts", "words"), [([1, 2], "one for each expert"), ([1.0] * 3, "whole numbers"), ([1, 1, 1], "adds up to 3")]
)
def test_counts_that_do_not_fit(counts, words):
    with pytest.raises(ValueError, match=words):
        fmoe.FMoELinear(3, 5, 4)(torch.randn(4, 5), counts)
