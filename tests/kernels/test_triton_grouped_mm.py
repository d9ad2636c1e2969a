"""One matrix product per expert by Triton, against the reference."""

import pytest
import torch
from helpers import CASES, assert_measured, run_with_grads

pytest.importorskip("triton")

from triton_cases import (
    DEVICE,
    DTYPES,
    LARGE,
    assert_equal,
    assert_strides_do_not_matter,
    moved,
    routed,
    three_ways,
    use_tile,
)

from fastmoe import kernels
from fastmoe.kernels.triton.tiles import Tile

pytestmark = pytest.mark.usefixtures("poison")


def inputs(counts, num_dropped, I, O, bias, dtype):
    """`(through, tensors, upstream)`: so many rows for each expert, and some past the last one's."""
    N, E = sum(counts) + num_dropped, len(counts)
    offsets_E = torch.tensor(counts).cumsum(0).int().to(DEVICE)
    tensors = {"rows": torch.randn(N, I).to(dtype), "weight": (torch.randn(E, O, I) / I**0.5).to(dtype)}
    tensors["bias"] = torch.randn(E, O).to(dtype) if bias else None

    def through(backend):
        return lambda rows, weight, bias: kernels.grouped_mm(rows, weight, offsets_E, bias, backend=backend)

    return through, tensors, torch.randn(N, O)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("bias", [True, False])
def test_every_case(name, bias):
    case = CASES[name]
    _, expert_ids_N, _, plan = routed(case)
    num_dropped = int((expert_ids_N == -1).sum())
    assert_measured(*three_ways(*inputs(plan.counts_E.tolist(), num_dropped, case.D, case.H, bias, torch.float32)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("I", "O"), [(63, 65), (65, 100), (100, 129), (129, 63)])
def test_odd_sizes(I, O, bias, dtype, monkeypatch):
    use_tile(monkeypatch, LARGE)
    assert_measured(*three_ways(*inputs([65, 0, 63, 1], 5, I, O, bias, dtype)))


COUNTS = {
    "single_expert": ([29], 0),
    "one_row": ([0, 0, 1], 0),
    "no_row": ([0, 0], 0),
    "all_dropped": ([0, 0], 3),
    "all_to_the_first": ([40, 0, 0], 0),
    "all_to_the_last": ([0, 0, 40], 2),
    "whole_tiles": ([16, 32, 0, 16], 16),
    "more_experts_than_are_looked_up_at_once": ([0, 1] * 70, 1),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", COUNTS)
def test_rows_of_each_expert(name, dtype):
    assert_measured(*three_ways(*inputs(*COUNTS[name], 18, 9, True, dtype)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "tile",
    [
        Tile(16, 16, 16, group=1, warps=4, stages=1),
        Tile(32, 16, 32, group=3, warps=4, stages=1, split=3),
        Tile(16, 32, 32, warps=4, stages=1, tma=True),
        Tile(16, 64, 16, warps=4, stages=1, tma=True, split=2),
    ],
    ids=["small", "split", "tma", "tma_split"],
)
def test_tiles(tile, dtype, monkeypatch):
    asked = use_tile(monkeypatch, tile)
    for I, O in ((40, 24), (50, 17)):  # the second has rows that tensor descriptors do not take
        assert_measured(*three_ways(*inputs([17, 0, 33, 5], 3, I, O, True, dtype)))
    assert set(asked) == {"product", "turned", "weight"}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_by_pytorch_where_that_is_faster(dtype, monkeypatch):
    use_tile(monkeypatch, None)
    assert_measured(*three_ways(*inputs([17, 0, 33, 5], 3, 16, 24, False, dtype)))


@pytest.mark.parametrize("tile", [LARGE, None], ids=["triton", "pytorch"])
def test_rows_past_the_last_expert_are_never_read(tile, monkeypatch):
    use_tile(monkeypatch, tile)
    through, tensors, upstream = inputs([5, 0, 6], 4, 24, 8, tile is not None, torch.float32)
    tensors, upstream = moved(tensors), upstream.to(DEVICE)
    clean = run_with_grads(through("triton"), tensors, upstream)
    assert not clean["out"][11:].any()
    assert not clean["rows"][11:].any()
    tensors["rows"][11:] = torch.nan
    upstream[11:] = torch.nan
    assert_equal(run_with_grads(through("triton"), tensors, upstream), clean)


def test_strides_do_not_matter():
    through, tensors, upstream = inputs([5, 0, 6], 4, 18, 9, True, torch.float32)
    assert_strides_do_not_matter(through("triton"), tensors, upstream)


@pytest.mark.parametrize("frozen", [["rows"], ["weight"], ["bias"], ["rows", "weight"], ["weight", "bias"]])
def test_frozen_arguments(frozen):
    through, tensors, upstream = inputs([5, 0, 6], 4, 18, 9, True, torch.float32)
    tensors, upstream = moved(tensors), upstream.to(DEVICE)
    expected = run_with_grads(through("triton"), tensors, upstream)
    constant = {name: tensors[name] for name in frozen}
    learned = {name: t for name, t in tensors.items() if name not in frozen}
    got = run_with_grads(lambda **leaves: through("triton")(**leaves, **constant), learned, upstream)
    assert_equal(got, {name: t for name, t in expected.items() if name not in frozen})


def test_the_same_bits_twice():
    args = inputs([33, 0, 6], 4, 50, 35, True, torch.float32)
    tensors, upstream = moved(args[1]), args[2].to(DEVICE)
    first, second = (run_with_grads(args[0]("triton"), tensors, upstream) for _ in range(2))
    assert_equal(first, second)


def test_second_derivative_is_refused():
    through, tensors, _ = inputs([5, 0, 6], 4, 18, 9, True, torch.float32)
    leaves = {name: t.requires_grad_() for name, t in moved(tensors).items()}
    (grad,) = torch.autograd.grad(through("triton")(**leaves).square().sum(), leaves["rows"], create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative; use backend='reference'"):
        grad.sum().backward()
