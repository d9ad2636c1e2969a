"""Sorting rows by expert."""

import pytest
import torch
from helpers import CASES, route

from fastmoe import kernels
from fastmoe.kernels.torch_ops.layout import choose_layout

pytestmark = pytest.mark.usefixtures("poison")


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("name", CASES)
def test_against_a_stable_sort(backend, name):
    case = CASES[name]
    _, expert_ids_N, _ = route(case)
    ids = expert_ids_N.tolist()
    order = sorted(range(len(ids)), key=lambda n: case.E if ids[n] == -1 else ids[n])  # Python's sort is stable
    counts = [ids.count(e) for e in range(case.E)]
    plan = kernels.plan(expert_ids_N, case.E, backend=backend)
    assert (plan.order_N.dtype, plan.offsets_E.dtype) == (torch.int64, torch.int32)
    assert plan.order_N.tolist() == order
    assert plan.offsets_E.tolist() == [sum(counts[: e + 1]) for e in range(case.E)]
    assert plan.counts_E.tolist() == counts
    assert plan.counts_E.dtype == torch.int32


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_strided_ids(backend):
    ids_NK = torch.randint(3, (50, 2))
    plan = kernels.plan(ids_NK[:, 1], 3, backend=backend)
    assert torch.equal(plan.order_N, torch.argsort(ids_NK[:, 1], stable=True))


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("ids", [[0, 3, 1], [0, -2, 1], [2**40, 0, 0]])
def test_an_id_out_of_range(backend, ids):
    with pytest.raises(
        ValueError, match=rf"expert ids must lie in 0..2, or be -1 .*; the router gave {min(ids)}..{max(ids)}"
    ):
        kernels.plan(torch.tensor(ids), 3, backend=backend)


@pytest.mark.parametrize(
    "ids", [torch.zeros(3, dtype=torch.int32), torch.zeros(3), torch.zeros(2, 2, dtype=torch.int64)]
)
def test_ids_of_another_kind(ids):
    with pytest.raises(ValueError, match=r"expert ids must be int64 \(N,\), got"):
        kernels.plan(ids, 3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_hot_expert_is_not_padded_to(dtype):
    counts = torch.tensor([2500] + [2] * 511)
    layout = choose_layout(int(counts.sum()), counts.cumsum(0).int(), torch.empty(512, 128, 64, dtype=dtype))
    assert layout.num_slots <= 4 * int(counts.sum())
