"""One matrix product per expert, and the weighted sum of a token's rows."""

import pytest
import torch
from helpers import CASES, Case, assert_measured, assert_same, cast, route, run_with_grads

from fastmoe import kernels

pytestmark = pytest.mark.usefixtures("poison")


def mm_inputs(case, bias, dtype):
    _, expert_ids_N, _ = route(case)
    plan = kernels.plan(expert_ids_N, case.E, backend="reference")
    shapes = {"rows": (len(expert_ids_N), case.D), "weight": (case.E, case.H, case.D), "bias": (case.E, case.H)}
    tensors = {name: torch.randn(shape).to(dtype) for name, shape in shapes.items()}
    return plan, tensors if bias else tensors | {"bias": None}, torch.randn(len(expert_ids_N), case.H)


def mm_through(backend, plan):
    return lambda rows, weight, bias: kernels.grouped_mm(rows, weight, plan.offsets_E, bias, backend=backend)


def combine_inputs(case, dtype):
    token_ids_N, expert_ids_N, _ = route(case)
    plan = kernels.plan(expert_ids_N, case.E, backend="reference")
    tensors = {"rows": torch.randn(len(token_ids_N), case.D).to(dtype)}
    tensors["weights"] = torch.randn(len(token_ids_N), dtype=kernels.accumulation_dtype(dtype))
    return plan, token_ids_N, tensors, torch.randn(case.T, case.D)


def combine_through(backend, plan, token_ids_N, num_tokens):
    return lambda rows, weights: kernels.combine(rows, token_ids_N, weights, plan, num_tokens, backend=backend)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("bias", [True, False])
def test_reference_grouped_mm_is_row_by_row(name, bias):
    case = CASES[name]
    plan, tensors, upstream = mm_inputs(case, bias, torch.float64)
    expert_of = [e for e, count in enumerate(plan.counts_E.tolist()) for _ in range(count)]

    def slow(rows, weight, bias):
        out = [weight[e] @ rows[n] + (0 if bias is None else bias[e]) for n, e in enumerate(expert_of)]
        out += [torch.zeros(case.H, dtype=rows.dtype)] * (len(rows) - len(out))
        tied = sum((0 * t).sum() for t in (rows, weight, bias) if t is not None)
        return (torch.stack(out) if out else rows.new_zeros(0, case.H)) + tied

    assert_same(
        run_with_grads(mm_through("reference", plan), tensors, upstream), run_with_grads(slow, tensors, upstream)
    )


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("layout", ["loop", "padded", "grouped"])
def test_grouped_mm(name, bias, layout, force_layout):
    calls = force_layout(layout)
    case = CASES[name]
    if layout == "grouped":
        case = Case(case.T, case.E, 8, 16, case.K, case.routed)
    for dtype in (torch.float64, torch.float32) if layout != "grouped" else (torch.float32, torch.bfloat16):
        plan, tensors, upstream = mm_inputs(case, bias, dtype)
        got = run_with_grads(mm_through("torch", plan), tensors, upstream)
        plain = run_with_grads(mm_through("reference", plan), tensors, upstream)
        if dtype == torch.float64:
            assert_same(got, plain)
        upstream = upstream.to(dtype)
        exact = run_with_grads(mm_through("reference", plan), cast(tensors, torch.float64), upstream)
        assert_measured(got, plain, exact)
    assert calls


@pytest.mark.parametrize("name", CASES)
def test_reference_combine_is_row_by_row(name):
    case = CASES[name]
    plan, token_ids_N, tensors, upstream = combine_inputs(case, torch.float64)
    computed = plan.order_N[: plan.offsets_E[-1]].tolist()

    def slow(rows, weights):
        y = [torch.zeros(case.D, dtype=rows.dtype) for _ in range(case.T)]
        for position, n in enumerate(computed):
            y[token_ids_N[n]] = y[token_ids_N[n]] + weights[n] * rows[position]
        return (torch.stack(y) if y else rows.new_zeros(0, case.D)) + (0 * rows).sum() + (0 * weights).sum()

    through = combine_through("reference", plan, token_ids_N, case.T)
    assert_same(run_with_grads(through, tensors, upstream), run_with_grads(slow, tensors, upstream))


@pytest.mark.parametrize("name", CASES)
def test_combine(name):
    case = CASES[name]
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        plan, token_ids_N, tensors, upstream = combine_inputs(case, dtype)
        upstream = upstream.to(dtype)
        args = (plan, token_ids_N, case.T)
        got = run_with_grads(combine_through("torch", *args), tensors, upstream)
        plain = run_with_grads(combine_through("reference", *args), tensors, upstream)
        exact = run_with_grads(combine_through("reference", *args), cast(tensors, torch.float64), upstream)
        assert_measured(got, plain, exact)


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_rows_that_are_not_computed_are_never_read(backend):
    case = CASES["dropped"]
    plan, token_ids_N, tensors, upstream = combine_inputs(case, torch.float64)
    through = combine_through(backend, plan, token_ids_N, case.T)
    clean = run_with_grads(through, tensors, upstream)
    end = int(plan.offsets_E[-1])
    tensors["rows"][end:] = torch.nan
    tensors["weights"][plan.order_N[end:]] = torch.nan
    assert_same(run_with_grads(through, tensors, upstream), clean)

    plan, tensors, upstream = mm_inputs(case, True, torch.float64)
    clean = run_with_grads(mm_through(backend, plan), tensors, upstream)
    end = int(plan.offsets_E[-1])
    tensors["rows"][end:] = torch.nan
    upstream[end:] = torch.nan
    assert_same(run_with_grads(mm_through(backend, plan), tensors, upstream), clean)


@pytest.mark.parametrize("layout", ["loop", "padded"])
def test_gradcheck(layout, force_layout):
    force_layout(layout)
    case = Case(5, 3, 3, 2, 2, "dropped")
    plan, tensors, _ = mm_inputs(case, True, torch.float64)
    assert torch.autograd.gradcheck(mm_through("torch", plan), [t.requires_grad_() for t in tensors.values()])
    plan, token_ids_N, tensors, _ = combine_inputs(case, torch.float64)
    through = combine_through("torch", plan, token_ids_N, case.T)
    assert torch.autograd.gradcheck(through, [t.requires_grad_() for t in tensors.values()])


@pytest.mark.parametrize("frozen", [["rows"], ["weight"], ["bias"], ["rows", "weight"]])
def test_frozen_arguments(frozen):
    plan, tensors, upstream = mm_inputs(CASES["odd"], True, torch.float64)
    expected = run_with_grads(mm_through("reference", plan), tensors, upstream)
    constant = {name: tensors[name] for name in frozen}
    learned = {name: t for name, t in tensors.items() if name not in frozen}
    got = run_with_grads(lambda **leaves: mm_through("torch", plan)(**leaves, **constant), learned, upstream)
    assert_same(got, {name: t for name, t in expected.items() if name not in frozen})


def test_second_derivative_is_refused():
    plan, tensors, _ = mm_inputs(CASES["odd"], True, torch.float64)
    leaves = {name: t.requires_grad_() for name, t in tensors.items()}
    out = mm_through("torch", plan)(**leaves)
    (grad,) = torch.autograd.grad(out.square().sum(), leaves["rows"], create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        grad.sum().backward()


def test_an_expanded_upstream_gradient():
    for layout_case in ("odd", "dropped"):
        plan, tensors, _ = mm_inputs(CASES[layout_case], True, torch.float64)
        sums = {}
        for backend in ("torch", "reference"):
            leaves = [t.clone().requires_grad_() for t in tensors.values()]
            sums[backend] = torch.autograd.grad(mm_through(backend, plan)(*leaves).sum(), leaves)
        for got, expected in zip(sums["torch"], sums["reference"], strict=True):
            torch.testing.assert_close(got, expected)


def test_bad_arguments():
    case = CASES["odd"]
    plan, tensors, _ = mm_inputs(case, True, torch.float32)
    for change, message in [
        ({"weight": torch.randn(5, 9, 6)}, r"weight must be \(E, O, 7\), got \(5, 9, 6\)"),
        ({"weight": torch.randn(9, 7)}, r"weight must be \(E, O, 7\), got \(9, 7\)"),
        ({"weight": torch.randn(4, 9, 7), "bias": None}, "weight must have 5 experts"),
        ({"bias": torch.randn(5, 7)}, r"bias of weight must be \(5, 9\)"),
        ({"bias": torch.randn(5, 9).double()}, "must have one dtype"),
        ({"rows": torch.randn(26, 7).double()}, "must have one dtype"),
    ]:
        with pytest.raises(ValueError, match=message):
            mm_through("torch", plan)(**(tensors | change))
    plan, token_ids_N, tensors, _ = combine_inputs(case, torch.float32)
    for change in ({"rows": torch.randn(25, 7)}, {"rows": torch.randn(26)}, {"weights": torch.randn(25)}):
        with pytest.raises(ValueError, match="must be"):
            combine_through("torch", plan, token_ids_N, case.T)(**(tensors | change))


@pytest.mark.parametrize("layout", ["loop", "padded", "grouped"])
def test_the_gradient_of_a_transposed_weight_lies_as_the_weight_does(layout, force_layout):
    calls = force_layout(layout)
    plan, tensors, upstream = mm_inputs(Case(13, 5, 8, 16, 2), True, torch.float32)
    expected = run_with_grads(mm_through("reference", plan), tensors, upstream)
    stored_EIO = tensors["weight"].transpose(1, 2).contiguous().requires_grad_()
    weight = stored_EIO.transpose(1, 2)
    strides = []
    weight.register_hook(lambda grad: strides.append(grad.stride()))
    out = kernels.grouped_mm(tensors["rows"], weight, plan.offsets_E, tensors["bias"], backend="torch")
    out.backward(upstream)
    torch.testing.assert_close(out, expected["out"])
    torch.testing.assert_close(stored_EIO.grad.transpose(1, 2), expected["weight"])
    assert strides == [weight.stride()]
    assert calls
