"""The gradient of stacked weights by Triton, against loops in float64; with experts' rows cut into pieces, or whole."""

import pytest
import torch
from helpers import Case, assert_measured

pytest.importorskip("triton")

from triton_cases import DEVICE, DTYPES, KINDS, mlp_three_ways

from fastmoe.kernels.triton import weight_grad
from fastmoe.kernels.triton.tiles import Tile

pytestmark = pytest.mark.usefixtures("poison")
SMALL = Tile(32, 32, 16, group=2, warps=4, stages=1)


@pytest.fixture
def cut(monkeypatch):
    """`cut(height)`: pieces of so many rows, None for whole experts; the answer lists the launches that had pieces."""
    cuts, tiles_of = [], weight_grad.tiles_of

    def spy(offsets_E, num_rows, *rest, **options):
        cuts.append(num_rows)
        return tiles_of(offsets_E, num_rows, *rest, **options)

    def set_height(height):
        monkeypatch.setattr(weight_grad, "_height", lambda num_rows, *sizes: height or num_rows)
        monkeypatch.setattr(weight_grad, "tiles_of", spy)
        return cuts

    return set_height


def by_loop(a, b, row_weights, counts, dtype):
    """`(grad, sums)`, every product and sum taken in `dtype`."""
    grads, sums, start = [], [], 0
    for count in counts:
        rows = slice(start, start + count)
        grads.append(a[rows].to(dtype).T @ b[rows].to(dtype))
        weighted = a[rows] if row_weights is None else a[rows] * row_weights[rows, None]
        sums.append(weighted.to(dtype).sum(0))
        start += count
    return {"out": torch.stack(grads), "sums": torch.stack(sums)}


COUNTS = {
    "uneven": [7, 0, 25, 1, 0, 12],
    "half_to_one": [1, 2, 3, 24, 3, 0, 2, 1, 12],
    "one_gets_all": [0, 0, 40, 0],
    "single_expert": [37],
    "one_row": [0, 0, 1],
    "all_dropped": [0, 0, 0],
    "many_experts": [0] * 20 + [18] + [0] * 110 + [5, 0, 9],
}


@pytest.mark.parametrize(("height", "weighted"), [(1, True), (3, False), (16, True), (None, True), (None, False)])
@pytest.mark.parametrize("name", COUNTS)
def test_sums_over_an_experts_rows(name, height, weighted, cut):
    cuts, counts = cut(height), COUNTS[name]
    num_rows = sum(counts) + 5  # the last five are dropped
    offsets_E = torch.tensor(counts).cumsum(0).int()
    a, b, row_weights = torch.randn(num_rows, 21), torch.randn(num_rows, 18), torch.randn(num_rows)
    for tensor in (a, b, row_weights):
        tensor[sum(counts) :] = torch.nan
    a, b, row_weights, offsets_E = (t.to(DEVICE) for t in (a, b, row_weights, offsets_E))
    row_weights = row_weights if weighted else None
    args = (a, None, b, None, offsets_E, num_rows, SMALL, row_weights)
    grad, sums = weight_grad.weight_grad(*args, need_sums=True)
    plain = by_loop(a, b, row_weights, counts, torch.float32)
    assert_measured({"out": grad, "sums": sums}, plain, by_loop(a, b, row_weights, counts, torch.float64))
    assert bool(cuts) == (height is not None and height < num_rows)


@pytest.mark.parametrize("height", [5, None])
def test_without_sums(height, cut):
    cut(height)
    a, b = torch.randn(2, 20, 40).to(DEVICE)
    args = (a, None, b, None, torch.tensor([0, 13, 18], dtype=torch.int32, device=DEVICE), 20, SMALL)
    grad, sums = weight_grad.weight_grad(*args)
    assert sums is None
    assert torch.equal(grad, weight_grad.weight_grad(*args, need_sums=True)[0])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("height", [5, None])
def test_gathered_rows(height, dtype, cut):
    cut(height)
    counts = [3, 20, 0, 10]
    offsets_E = torch.tensor(counts).cumsum(0).int().to(DEVICE)
    a_TD, b_TD = (torch.randn(9, width).to(DEVICE, dtype) for width in (40, 33))
    a_index, b_index = torch.randint(9, (2, 33), dtype=torch.int32).to(DEVICE)
    got = dict(
        zip(
            ("out", "sums"),
            weight_grad.weight_grad(a_TD, a_index, b_TD, b_index, offsets_E, 33, SMALL, None, True),
            strict=True,
        )
    )
    a, b = a_TD[a_index], b_TD[b_index]
    assert_measured(got, by_loop(a, b, None, counts, dtype), by_loop(a, b, None, counts, torch.float64))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("height", [4, None])
def test_in_the_mlp(height, dtype, cut):
    cuts = cut(height)
    case = Case(12, 3, 17, 9, 2, "duplicates")
    assert_measured(*mlp_three_ways(case, *KINDS[dtype == torch.float32], dtype))
    assert bool(cuts) == (height is not None)


@pytest.mark.parametrize("processors", [1, 4, 132])
@pytest.mark.parametrize("per_expert", [1, 3, 40])
def test_height_of_a_piece(per_expert, processors):
    """One step at least, and no more than a quarter of what a multiprocessor has to do."""
    for num_rows in (1, 15, 1000, 100_000):
        height = weight_grad._height(num_rows, per_expert, 32, processors)
        assert height >= 32
        assert height == 32 or height - 1 < num_rows * per_expert / (4 * processors)
