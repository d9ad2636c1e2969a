"""The counting sort of the `triton` backend against Python's stable sort."""

import pytest
import torch
from helpers import CASES, route

pytest.importorskip("triton")

from triton_cases import DEVICE

from fastmoe import kernels
from fastmoe.kernels.triton import sort

pytestmark = pytest.mark.usefixtures("poison")


def check(ids_N, num_experts):
    plan = kernels.plan(ids_N.to(DEVICE), num_experts, backend="triton")
    ids = ids_N.tolist()
    order = sorted(range(len(ids)), key=lambda n: num_experts if ids[n] == -1 else ids[n])
    counts = torch.bincount(ids_N[ids_N != -1], minlength=num_experts)
    assert (plan.order_N.dtype, plan.offsets_E.dtype) == (torch.int64, torch.int32)
    assert plan.order_N.tolist() == order
    assert plan.offsets_E.tolist() == counts.cumsum(0).tolist()


@pytest.fixture
def chunks(monkeypatch):
    """`chunks(most)`: a machine of so many processors; the answer lists the number of chunks of every sort."""
    launched = []

    class Spy:
        def __init__(self, kernel):
            self.kernel = kernel

        def __getitem__(self, grid):
            launched.append(grid[0])
            return self.kernel[grid]

    def set_most(most):
        monkeypatch.setattr(sort, "num_processors", lambda device: most)
        monkeypatch.setattr(sort, "place_kernel", Spy(sort.place_kernel))
        return launched

    return set_most


@pytest.mark.parametrize("name", CASES)
def test_every_case(name):
    _, expert_ids_N, _ = route(CASES[name])
    check(expert_ids_N, CASES[name].E)


@pytest.mark.parametrize("E", [1, 5, 129, 4096])
@pytest.mark.parametrize("N", [1, 127, 128, 129, 700])
def test_one_launch(N, E, chunks):
    launched = chunks(7)
    check(torch.randint(-1, E, (N,)), E)
    assert launched == [1]


@pytest.mark.parametrize("E", [1, 5, 129, 4096])
@pytest.mark.parametrize("most", [3, 40])
def test_several_chunks(most, E, chunks):
    launched = chunks(most)
    check(torch.randint(-1, E, (5000,)), E)
    assert launched == [min(most, 10)]


def test_more_chunks_than_are_counted_at_once(chunks):
    launched = chunks(40)
    check(torch.randint(-1, 5, (9001,)), 5)
    assert launched == [18]


@pytest.mark.parametrize("N", [2047, 2048, 2049])
def test_both_sides_of_what_one_launch_takes(N, chunks):
    launched = chunks(3)
    check(torch.randint(-1, 7, (N,)), 7)
    assert launched == [1 if N <= 2048 else 3]


def test_chunks_of_uneven_length(chunks):
    """The last chunk may be short, or have no row at all."""
    for most in (4, 5):
        chunks(most)
        for N in (2050, 2053, 2561):
            check(torch.randint(-1, 3, (N,)), 3)


@pytest.mark.parametrize("N", [0, 1, 300, 2600])
@pytest.mark.parametrize("expert", [-1, 0, 3, 8])
def test_all_to_one_expert(expert, N):
    check(torch.full((N,), expert), 9)


@pytest.mark.parametrize("N", [300, 2600])
def test_strided_ids(N):
    ids_NK = torch.randint(-1, 3, (N, 2)).to(DEVICE)
    plan = kernels.plan(ids_NK[:, 1], 3, backend="triton")
    expected = kernels.plan(ids_NK[:, 1].clone(), 3, backend="reference")
    assert torch.equal(plan.order_N, expected.order_N)
    assert torch.equal(plan.offsets_E, expected.offsets_E)


def test_sorted_and_reversed_ids():
    ids = torch.arange(2500) // 20
    check(ids, 125)
    check(ids.flip(0), 125)


@pytest.mark.skipif(DEVICE.type == "cuda", reason="a device assertion ends the process")
@pytest.mark.parametrize("ids", [[0, 3, 1], [0, -2, 1], [2**40, 0, 0], [-(2**32), 0, 0], [0] * 2500 + [3]])
def test_an_id_out_of_range(ids):
    with pytest.raises(
        ValueError, match=rf"expert ids must lie in 0..2, or be -1 .*; the router gave {min(ids)}..{max(ids)}"
    ):
        kernels.plan(torch.tensor(ids), 3, backend="triton")
