"""Each token's weighted sum of its rows by Triton, against the reference."""

import pytest
import torch
from helpers import CASES, Case, assert_measured, run_with_grads

pytest.importorskip("triton")

from triton_cases import DEVICE, assert_equal, assert_strides_do_not_matter, moved, routed, three_ways

from fastmoe import kernels

pytestmark = pytest.mark.usefixtures("poison")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def inputs(case, dtype):
    """`(through, tensors, upstream)`, and the plan."""
    token_ids_N, _, _, plan = routed(case)
    tensors = {"rows": torch.randn(len(token_ids_N), case.D).to(dtype)}
    tensors["weights"] = torch.randn(len(token_ids_N), dtype=kernels.accumulation_dtype(dtype))

    def through(backend):
        return lambda rows, weights: kernels.combine(rows, token_ids_N, weights, plan, case.T, backend=backend)

    return through, tensors, torch.randn(case.T, case.D), plan


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_every_case(name, dtype):
    assert_measured(*three_ways(*inputs(CASES[name], dtype)[:3]))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "case",
    [
        Case(1, 1, 33, 1, 1),
        Case(7, 3, 1025, 1, 2, "dropped"),
        Case(5, 2, 2048, 1, 1),
        Case(65, 5, 1, 1, 3, "expert_choice"),
        Case(2, 40, 17, 1, 40),
    ],
    ids=["one_row", "past_a_block", "two_blocks", "width_one", "many_rows_of_a_token"],
)
def test_odd_sizes(case, dtype):
    assert_measured(*three_ways(*inputs(case, dtype)[:3]))


@pytest.mark.parametrize("name", ["dropped", "all_dropped", "expert_choice"])
def test_rows_that_are_not_computed_are_never_read(name):
    through, tensors, upstream, plan = inputs(CASES[name], torch.float32)
    tensors, upstream, end = moved(tensors), upstream.to(DEVICE), int(plan.offsets_E[-1])
    clean = run_with_grads(through("triton"), tensors, upstream)
    assert not clean["rows"][end:].any()
    assert not clean["weights"][plan.order_N[end:]].any()
    tensors["rows"][end:] = torch.nan
    tensors["weights"][plan.order_N[end:]] = torch.nan
    assert_equal(run_with_grads(through("triton"), tensors, upstream), clean)


def test_the_gradient_of_a_token_without_a_row_is_never_read():
    case = Case(6, 3, 5, 1, 2)
    _, tensors, upstream, _ = inputs(case, torch.float32)
    token_ids_N = torch.arange(6, device=DEVICE).repeat_interleave(2)
    plan = kernels.plan(torch.where(token_ids_N == 4, -1, token_ids_N % 3), 3, backend="reference")
    upstream[4] = torch.nan

    def function(rows, weights):
        return kernels.combine(rows, token_ids_N, weights, plan, 6, backend="triton")

    got = run_with_grads(function, moved(tensors), upstream.to(DEVICE))
    assert not any(t.isnan().any() for t in got.values())


def test_strides_do_not_matter():
    through, tensors, upstream, _ = inputs(CASES["dropped"], torch.float32)
    assert_strides_do_not_matter(through("triton"), tensors, upstream)


@pytest.mark.parametrize("frozen", ["rows", "weights"])
def test_frozen_arguments(frozen):
    through, tensors, upstream, _ = inputs(CASES["dropped"], torch.float32)
    tensors, upstream = moved(tensors), upstream.to(DEVICE)
    expected = run_with_grads(through("triton"), tensors, upstream)
    constant = {frozen: tensors.pop(frozen)}
    got = run_with_grads(lambda **leaves: through("triton")(**leaves, **constant), tensors, upstream)
    assert_equal(got, {name: t for name, t in expected.items() if name != frozen})


def test_the_same_bits_twice():
    through, tensors, upstream, _ = inputs(Case(20, 5, 33, 1, 3, "expert_choice"), torch.float32)
    tensors, upstream = moved(tensors), upstream.to(DEVICE)
    first, second = (run_with_grads(through("triton"), tensors, upstream) for _ in range(2))
    assert_equal(first, second)


def test_second_derivative_is_refused():
    through, tensors, _, _ = inputs(CASES["odd"], torch.float32)
    leaves = {name: t.requires_grad_() for name, t in moved(tensors).items()}
    (grad,) = torch.autograd.grad(through("triton")(**leaves).square().sum(), leaves["rows"], create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative; use backend='reference'"):
        grad.sum().backward()
