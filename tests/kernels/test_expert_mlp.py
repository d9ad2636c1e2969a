"""The routed MLP: the reference against a loop over rows, the `torch` backend against the reference."""

import pytest
import torch
from helpers import CASES, Case, assert_measured, assert_same, cast, mlp_tensors, route, routed_mlp, run_with_grads

pytestmark = pytest.mark.usefixtures("poison")

PLAIN = {  # written anew, to be independent of fastmoe.kernels.activations
    "relu": lambda z: z.clamp(min=0),
    "gelu": lambda z: z * 0.5 * (1 + torch.erf(z / 2**0.5)),
    "gelu_tanh": lambda z: 0.5 * z * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (z + 0.044715 * z**3))),
    "silu": lambda z: z * torch.sigmoid(z),
}
GATED = {"reglu": "relu", "geglu": "gelu", "geglu_tanh": "gelu_tanh", "swiglu": "silu"}
KINDS = [("gelu", True), ("swiglu", False)]
LAYOUTS = ["loop", "padded", "grouped"]


def token_by_token(case, token_ids_N, expert_ids_N, activation):
    def function(x, weights, w1, b1, w2, b2):
        y = [torch.zeros(case.D, dtype=x.dtype) for _ in range(case.T)]
        for n, (t, e) in enumerate(zip(token_ids_N.tolist(), expert_ids_N.tolist(), strict=True)):
            if e == -1:
                continue
            pre = w1[e] @ x[t] + (0 if b1 is None else b1[e])
            if activation in GATED:
                hidden = PLAIN[GATED[activation]](pre[: case.H]) * pre[case.H :]
            else:
                hidden = PLAIN[activation](pre)
            y[t] = y[t] + weights[n] * (w2[e] @ hidden + (0 if b2 is None else b2[e]))
        tied = sum((0 * t).sum() for t in (x, weights, w1, b1, w2, b2) if t is not None)
        return (torch.stack(y) if y else x.new_zeros(0, case.D)) + tied

    return function


def three_ways(case, activation, bias, dtype, use_rows_per_token=True):
    """The `torch` backend, the reference in the same dtype, and the reference in float64."""
    token_ids_N, expert_ids_N, rows_per_token = route(case)
    tensors = mlp_tensors(case, len(token_ids_N), activation, bias, dtype)
    upstream = torch.randn(case.T, case.D).to(dtype)
    args = (case, token_ids_N, expert_ids_N, activation)
    got = run_with_grads(routed_mlp("torch", *args, rows_per_token * use_rows_per_token), tensors, upstream)
    plain = run_with_grads(routed_mlp("reference", *args, 0), tensors, upstream)
    exact = run_with_grads(routed_mlp("reference", *args, 0), cast(tensors, torch.float64), upstream)
    return got, plain, exact


def fit(case, layout):
    """`case` with widths that `F.grouped_mm` takes."""
    if layout != "grouped":
        return case
    return Case(case.T, case.E, 8 * -(-case.D // 8), 8 * -(-case.H // 8), case.K, case.routed)


@pytest.mark.parametrize("activation", [*PLAIN, *GATED])
@pytest.mark.parametrize("bias", [True, False])
def test_reference_is_the_formula(activation, bias):
    for name in ("odd", "dropped", "expert_choice", "no_token", "all_dropped"):
        case = CASES[name]
        token_ids_N, expert_ids_N, _ = route(case)
        tensors = mlp_tensors(case, len(token_ids_N), activation, bias, torch.float64)
        upstream = torch.randn(case.T, case.D)
        args = (case, token_ids_N, expert_ids_N, activation)
        slow = run_with_grads(token_by_token(*args), tensors, upstream)
        assert_same(run_with_grads(routed_mlp("reference", *args, 0), tensors, upstream), slow)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize(("activation", "bias"), KINDS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_torch_is_the_reference(name, activation, bias, layout, force_layout):
    calls = force_layout(layout)
    case = fit(CASES[name], layout)
    for use_rows_per_token in (True, False):
        if layout != "grouped":
            got, plain, _ = three_ways(case, activation, bias, torch.float64, use_rows_per_token)
            assert_same(got, plain)
        assert_measured(*three_ways(case, activation, bias, torch.float32, use_rows_per_token))
    assert calls


@pytest.mark.parametrize("activation", [*PLAIN, *GATED])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_activation(activation, bias, layout, force_layout):
    force_layout(layout)
    if layout != "grouped":
        got, plain, _ = three_ways(CASES["odd"], activation, bias, torch.float64)
        assert_same(got, plain)
    assert_measured(*three_ways(fit(CASES["dropped"], layout), activation, bias, torch.float32))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["dropped", "one_expert_gets_all", "expert_choice"])
def test_half_precision(dtype, layout, name, force_layout):
    force_layout(layout)
    case = CASES[name]
    case = Case(4 * case.T, case.E, 24, 40, case.K, case.routed)
    for (activation, bias), use_rows_per_token in zip(KINDS, (True, False), strict=True):
        assert_measured(*three_ways(case, activation, bias, dtype, use_rows_per_token))


def test_the_chosen_layout_depends_on_the_counts():
    from fastmoe.kernels.torch_ops.layout import LoopLayout, PaddedLayout, choose_layout

    weight = torch.empty(64, 32, 32)
    even = torch.arange(1, 65, dtype=torch.int32) * 2
    skewed = torch.full((64,), 100_000, dtype=torch.int32)
    assert isinstance(choose_layout(128, even, weight), PaddedLayout)
    assert isinstance(choose_layout(100_000, skewed, weight), LoopLayout)
    assert isinstance(choose_layout(3, torch.zeros(64, dtype=torch.int32), weight), LoopLayout)


@pytest.mark.parametrize("activation", ["gelu_tanh", "geglu"])
@pytest.mark.parametrize("name", ["odd", "dropped", "expert_choice"])
@pytest.mark.parametrize("layout", ["loop", "padded"])
def test_gradcheck(activation, name, layout, force_layout):
    force_layout(layout)
    case = CASES[name]
    case = Case(4, 3, 3, 2, 2, case.routed)
    token_ids_N, expert_ids_N, rows_per_token = route(case)
    tensors = mlp_tensors(case, len(token_ids_N), activation, True, torch.float64)
    function = routed_mlp("torch", case, token_ids_N, expert_ids_N, activation, rows_per_token)
    leaves = [t.requires_grad_() for t in tensors.values()]
    assert torch.autograd.gradcheck(lambda *args: function(**dict(zip(tensors, args, strict=True))), leaves)


@pytest.mark.parametrize("layout", ["loop", "padded"])
@pytest.mark.parametrize(
    "frozen", [["x"], ["weights"], ["w1", "b1", "w2", "b2"], ["x", "w1", "b1"], ["x", "weights", "w1", "b1", "w2"]]
)
def test_frozen_arguments(frozen, layout, force_layout):
    force_layout(layout)
    case = CASES["dropped"]
    token_ids_N, expert_ids_N, rows_per_token = route(case)
    tensors = mlp_tensors(case, len(token_ids_N), "swiglu", True, torch.float64)
    args = (case, token_ids_N, expert_ids_N, "swiglu")
    upstream = torch.randn(case.T, case.D)
    expected = run_with_grads(routed_mlp("reference", *args, 0), tensors, upstream)
    learned = {name: t for name, t in tensors.items() if name not in frozen}
    constant = {name: tensors[name] for name in frozen}
    function = routed_mlp("torch", *args, rows_per_token)
    got = run_with_grads(lambda **leaves: function(**leaves, **constant), learned, upstream)
    assert_same(got, {name: t for name, t in expected.items() if name not in frozen})


@pytest.mark.parametrize("layout", ["loop", "padded", "grouped"])
def test_strides_do_not_matter(layout, force_layout):
    force_layout(layout)
    dtype = torch.float32 if layout == "grouped" else torch.float64
    case = Case(6, 3, 8, 8, 2)
    token_ids_N, expert_ids_N, rows_per_token = route(case)
    tensors = mlp_tensors(case, len(token_ids_N), "geglu", True, dtype)
    function = routed_mlp("torch", case, token_ids_N, expert_ids_N, "geglu", rows_per_token)
    straight = {name: t.requires_grad_() for name, t in tensors.items()}
    # every argument a view with strides of its own, the upstream gradient expanded from one number
    spread = {name: t.detach().repeat_interleave(2, -1) for name, t in tensors.items()}
    turned = {name: t.mT.contiguous().mT if t.dim() > 1 else t for name, t in spread.items()}
    strided = {name: t[..., ::2].requires_grad_() for name, t in turned.items()}
    assert not any(t.is_contiguous() for t in strided.values())
    expected = torch.autograd.grad(function(**straight).sum(), list(straight.values()))
    got = torch.autograd.grad(function(**strided).sum(), list(strided.values()))
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b)


def test_nan_in_a_dropped_row_stays_there():
    """Token 0 is dropped everywhere: its values and its routing weights are never read."""
    case = CASES["dropped"]
    token_ids_N, expert_ids_N, rows_per_token = route(case)
    expert_ids_N = torch.where(token_ids_N == 0, -1, expert_ids_N)
    tensors = mlp_tensors(case, len(token_ids_N), "gelu", True, torch.float64)
    upstream = torch.randn(case.T, case.D)
    args = (case, token_ids_N, expert_ids_N, "gelu")
    clean = run_with_grads(routed_mlp("torch", *args, rows_per_token), tensors, upstream)
    assert (clean["weights"][expert_ids_N == -1] == 0).all()
    tensors["x"][0] = torch.nan
    tensors["weights"][expert_ids_N == -1] = torch.nan
    for per_token in (rows_per_token, 0):
        assert_same(run_with_grads(routed_mlp("torch", *args, per_token), tensors, upstream), clean)


def test_forward_alone_keeps_nothing():
    case = CASES["odd"]
    token_ids_N, expert_ids_N, _ = route(case)
    tensors = mlp_tensors(case, len(token_ids_N), "gelu", True, torch.float32)
    function = routed_mlp("torch", case, token_ids_N, expert_ids_N, "gelu", 0)
    assert not function(**tensors).requires_grad
    with torch.no_grad():
        assert not function(**{n: t.requires_grad_() for n, t in tensors.items()}).requires_grad
    with torch.inference_mode():
        torch.testing.assert_close(function(**tensors), function(**tensors))


def test_second_derivative_is_refused():
    case = CASES["odd"]
    token_ids_N, expert_ids_N, _ = route(case)
    tensors = {
        n: t.requires_grad_() for n, t in mlp_tensors(case, len(token_ids_N), "gelu", True, torch.float64).items()
    }
    for backend in ("torch", "reference"):
        y = routed_mlp(backend, case, token_ids_N, expert_ids_N, "gelu", 0)(**tensors)
        (dx,) = torch.autograd.grad(y.square().sum(), tensors["x"], create_graph=True)
        if backend == "torch":
            with pytest.raises(RuntimeError, match="no second derivative; use backend='reference'"):
                dx.sum().backward()
        else:
            dx.sum().backward()
            assert tensors["x"].grad.abs().sum() > 0


def test_autocast_computes_in_half_and_returns_full_gradients():
    case = Case(16, 3, 8, 16, 2)
    token_ids_N, expert_ids_N, rows_per_token = route(case)
    tensors = mlp_tensors(case, len(token_ids_N), "swiglu", True, torch.float32)
    function = routed_mlp("torch", case, token_ids_N, expert_ids_N, "swiglu", rows_per_token)
    upstream = torch.randn(case.T, case.D).bfloat16()
    weights = tensors["weights"]
    with torch.autocast("cpu", torch.bfloat16):
        got = run_with_grads(function, tensors, upstream)
    assert got["out"].dtype == torch.bfloat16
    assert {t.dtype for name, t in got.items() if name != "out"} == {torch.float32}
    half = run_with_grads(function, cast(tensors, torch.bfloat16) | {"weights": weights}, upstream)
    for name in got:
        assert torch.equal(got[name], half[name].to(got[name].dtype)), name


def test_bad_arguments():
    case = CASES["odd"]
    token_ids_N, expert_ids_N, _ = route(case)
    good = mlp_tensors(case, len(token_ids_N), "gelu", True, torch.float32)
    for change, message in [
        ({"w1": torch.randn(5, 10, 7)}, r"w1 of a gelu MLP must be \(E, 9, D\)"),
        ({"w1": torch.randn(5, 9, 8)}, r"w1 must be \(E, O, 7\), got \(5, 9, 8\)"),
        ({"b1": torch.randn(5, 8)}, r"bias of w1 must be \(5, 9\), got \(5, 8\)"),
        ({"b2": torch.randn(4, 7)}, r"bias of w2 must be \(5, 7\), got \(4, 7\)"),
        ({"w2": torch.randn(4, 7, 9), "b2": None}, "w2 must have 5 experts"),
        ({"w2": torch.randn(5, 6, 9), "b2": None}, r"w2 must be \(E, 7, H\), got \(5, 6, 9\)"),
        ({"w2": torch.randn(5, 7, 9).double()}, "must have one dtype"),
        ({"x": torch.randn(13, 7).double()}, "rows are torch.float64, w1 is torch.float32"),
        ({"weights": torch.randn(3)}, r"weights must be \(26,\), one for each row, got \(3,\)"),
    ]:
        with pytest.raises(ValueError, match=message):
            routed_mlp("torch", case, token_ids_N, expert_ids_N, "gelu", 0)(**(good | change))
    with pytest.raises(ValueError, match=r"unknown activation 'gelo'\. Did you mean 'gelu'"):
        routed_mlp("torch", case, token_ids_N, expert_ids_N, "gelo", 0)(**good)


def test_linear_in_the_routing_weights():
    """Twice the weights, twice the output: nothing but the routed rows adds to it."""
    case = CASES["dropped"]
    token_ids_N, expert_ids_N, _ = route(case)
    tensors = mlp_tensors(case, len(token_ids_N), "gelu", True, torch.float64)
    function = routed_mlp("torch", case, token_ids_N, expert_ids_N, "gelu", 0)
    doubled = function(**(tensors | {"weights": 2 * tensors["weights"]}))
    torch.testing.assert_close(doubled, 2 * function(**tensors))
    dropped_T = torch.ones(case.T, dtype=torch.bool).index_fill_(0, token_ids_N[expert_ids_N != -1], False)
    assert torch.equal(doubled[dropped_T], torch.zeros_like(doubled[dropped_T]))
