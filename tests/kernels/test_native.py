"""The `native` backend against the reference, and what happens where it cannot be had."""

import logging
import subprocess

import pytest
import torch
from helpers import CASES, Case, assert_measured, cast, mlp_tensors, route, routed_mlp, run_with_grads

import fastmoe
from fastmoe import kernels
from fastmoe.kernels import cache, registry
from fastmoe.kernels.native import library, mlp
from fastmoe.kernels.native.choice import hands_over
from fastmoe.kernels.torch_ops import ops

pytestmark = pytest.mark.usefixtures("poison")
ACTIVATIONS = ["relu", "gelu", "gelu_tanh", "silu", "reglu", "geglu", "geglu_tanh", "swiglu"]
DTYPES = [torch.float32, torch.bfloat16]
needs_library = pytest.mark.skipif(isinstance(library.load(), str), reason=f"no native library: {library.load()}")

LARGE = {  # rows, widths and depths on both sides of every block's edge
    "rows_past_a_chunk": Case(300, 1, 32, 32, 1),
    "rows_past_two_chunks": Case(290, 2, 32, 64, 2, "one"),
    "few_rows": Case(7, 8, 64, 96, 2),
    "panels": Case(150, 4, 32, 64, 2),
    "wide_hidden": Case(40, 3, 32, 288, 2, "dropped"),
    "wide_model": Case(40, 3, 288, 32, 2, "expert_choice"),
    "deep": Case(70, 2, 544, 608, 2),
}


def fit(case, dtype):
    """`case` with widths that the backend takes."""
    multiple = 64 // dtype.itemsize
    return Case(
        case.T, case.E, multiple * -(-case.D // multiple), multiple * -(-case.H // multiple), case.K, case.routed
    )


def three_ways(case, activation, bias, dtype, backend="native"):
    """The backend, the reference in the same dtype, and the reference in float64."""
    token_ids_N, expert_ids_N, per_token = route(case)
    tensors = mlp_tensors(case, len(token_ids_N), activation, bias, dtype)
    upstream = torch.randn(case.T, case.D).to(dtype)
    args = (case, token_ids_N, expert_ids_N, activation)
    got = run_with_grads(routed_mlp(backend, *args, per_token), tensors, upstream)
    plain = run_with_grads(routed_mlp("reference", *args, 0), tensors, upstream)
    exact = run_with_grads(routed_mlp("reference", *args, 0), cast(tensors, torch.float64), upstream)
    return got, plain, exact


@pytest.fixture(params=[True, False], ids=["tiles", "vectors"])
def tiles(request, monkeypatch):
    """bfloat16 by AMX where the processor has it, and without."""
    if request.param and not mlp._amx():
        pytest.skip("this processor has no AMX")
    monkeypatch.setattr(mlp, "_amx", lambda: request.param)


@needs_library
@pytest.mark.parametrize("name", [*CASES, *LARGE])
@pytest.mark.parametrize(("activation", "bias"), [("gelu", True), ("swiglu", False)])
def test_float32_is_the_reference(name, activation, bias):
    case = fit((CASES | LARGE)[name], torch.float32)
    assert_measured(*three_ways(case, activation, bias, torch.float32))


@needs_library
@pytest.mark.parametrize("name", [*CASES, *LARGE])
@pytest.mark.parametrize(("activation", "bias"), [("gelu", True), ("swiglu", False)])
def test_bfloat16_is_the_reference(name, activation, bias, tiles):
    case = fit((CASES | LARGE)[name], torch.bfloat16)
    assert_measured(*three_ways(case, activation, bias, torch.bfloat16))


@needs_library
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("bias", [True, False])
def test_every_activation(activation, bias, dtype):
    assert_measured(*three_ways(Case(61, 3, 32, 64, 2, "dropped"), activation, bias, dtype))


@needs_library
@pytest.mark.parametrize("activation", ACTIVATIONS[:4])
def test_activations_far_from_zero(activation):
    """One expert, w1 and w2 the identity: the activation itself, and its slope, over all magnitudes."""
    z = torch.cat(
        [torch.linspace(-12, 12, 4001), torch.tensor([-1e4, -100.0, -0.0, 0.0, 100.0, 1e4]), torch.randn(90) * 1e-4]
    )
    T = len(z) - len(z) % 16
    x = z[:T].view(-1, 16).clone().requires_grad_()
    eye = torch.eye(16)[None]
    plan = kernels.plan(torch.zeros(len(x), dtype=torch.int64), 1)
    rows = (torch.arange(len(x)), torch.ones(len(x)), plan)
    y = kernels.expert_mlp(x, *rows, eye, None, eye, None, activation=activation, backend="native")
    (slope,) = torch.autograd.grad(y.sum(), x)
    exact = x.detach().double().requires_grad_()
    expected = kernels.activate(activation, exact)
    (exact_slope,) = torch.autograd.grad(expected.sum(), exact)
    torch.testing.assert_close(y.double(), expected, rtol=1e-6, atol=2e-6)
    torch.testing.assert_close(slope.double(), exact_slope, rtol=1e-6, atol=2e-6)


@needs_library
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "frozen", [["x"], ["weights"], ["w1", "b1", "w2", "b2"], ["x", "w1", "b1"], ["x", "weights", "w1", "b1", "w2"]]
)
def test_frozen_arguments(frozen, dtype):
    case = Case(21, 4, 32, 32, 2, "dropped")
    token_ids_N, expert_ids_N, per_token = route(case)
    tensors = mlp_tensors(case, len(token_ids_N), "swiglu", True, dtype)
    function = routed_mlp("native", case, token_ids_N, expert_ids_N, "swiglu", per_token)
    upstream = torch.randn(case.T, case.D).to(dtype)
    expected = run_with_grads(function, tensors, upstream)
    constant = {name: tensors[name] for name in frozen}
    learned = {name: t for name, t in tensors.items() if name not in frozen}
    got = run_with_grads(lambda **leaves: function(**leaves, **constant), learned, upstream)
    for name, value in got.items():
        assert torch.equal(value, expected[name]), name


@needs_library
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strides_do_not_matter(dtype):
    case = Case(9, 3, 32, 32, 2)
    token_ids_N, expert_ids_N, per_token = route(case)
    tensors = mlp_tensors(case, len(token_ids_N), "geglu", True, dtype)
    function = routed_mlp("native", case, token_ids_N, expert_ids_N, "geglu", per_token)
    straight = {name: t.requires_grad_() for name, t in tensors.items()}
    spread = {name: t.detach().repeat_interleave(2, -1) for name, t in tensors.items()}
    turned = {name: t.mT.contiguous().mT if t.dim() > 1 else t for name, t in spread.items()}
    strided = {name: t[..., ::2].requires_grad_() for name, t in turned.items()}
    expected = torch.autograd.grad(function(**straight).sum(), list(straight.values()))
    got = torch.autograd.grad(function(**strided).sum(), list(strided.values()))
    for a, b in zip(got, expected, strict=True):
        assert torch.equal(a, b)


@needs_library
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nan_in_a_dropped_row_stays_there(dtype):
    case = Case(40, 3, 32, 64, 2, "dropped")
    token_ids_N, expert_ids_N, per_token = route(case)
    expert_ids_N = torch.where(token_ids_N == 0, -1, expert_ids_N)
    tensors = mlp_tensors(case, len(token_ids_N), "gelu", True, dtype)
    function = routed_mlp("native", case, token_ids_N, expert_ids_N, "gelu", per_token)
    upstream = torch.randn(case.T, case.D).to(dtype)
    clean = run_with_grads(function, tensors, upstream)
    assert (clean["weights"][expert_ids_N == -1] == 0).all()
    tensors["x"][0] = torch.nan
    tensors["weights"][expert_ids_N == -1] = torch.nan
    dirty = run_with_grads(function, tensors, upstream)
    for name in clean:
        assert torch.equal(dirty[name], clean[name]), name


@needs_library
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nan_in_a_row_reaches_its_token_alone(dtype):
    case = Case(40, 3, 32, 64, 2)
    token_ids_N, expert_ids_N, per_token = route(case)
    tensors = mlp_tensors(case, len(token_ids_N), "gelu", True, dtype)
    tensors["x"][7] = torch.nan
    y = routed_mlp("native", case, token_ids_N, expert_ids_N, "gelu", per_token)(**tensors)
    assert y.isnan().any(1).nonzero().flatten().tolist() == [7]


@needs_library
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", [*LARGE, "many_panels"])
def test_threads_do_not_change_the_numbers(case, dtype):
    """What the others compare with the reference may have been computed by one."""
    case = fit((LARGE | {"many_panels": Case(50, 3, 160, 288, 2)})[case], dtype)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 3):
            torch.manual_seed(1)
            torch.set_num_threads(count)
            results.append(three_ways(case, "gelu", True, dtype)[0])
    finally:
        torch.set_num_threads(threads)
    for name in results[0]:
        assert torch.equal(results[0][name], results[1][name]), name


@needs_library
def test_autocast_and_inference():
    case = Case(16, 3, 32, 64, 2)
    token_ids_N, expert_ids_N, per_token = route(case)
    tensors = mlp_tensors(case, len(token_ids_N), "swiglu", True, torch.float32)
    function = routed_mlp("native", case, token_ids_N, expert_ids_N, "swiglu", per_token)
    upstream = torch.randn(case.T, case.D).bfloat16()
    weights = tensors["weights"]
    with torch.autocast("cpu", torch.bfloat16):
        got = run_with_grads(function, tensors, upstream)
    assert {t.dtype for name, t in got.items() if name != "out"} == {torch.float32}
    half = run_with_grads(function, cast(tensors, torch.bfloat16) | {"weights": weights}, upstream)
    for name in got:
        assert torch.equal(got[name], half[name].to(got[name].dtype)), name
    with torch.inference_mode():
        assert torch.equal(function(**tensors), function(**tensors))


@needs_library
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_routing_weights_in_another_dtype(dtype):
    case = Case(16, 3, 32, 64, 2)
    token_ids_N, expert_ids_N, per_token = route(case)
    tensors = mlp_tensors(case, len(token_ids_N), "gelu", True, torch.float32)
    tensors["weights"] = tensors["weights"].to(dtype)
    args = (case, token_ids_N, expert_ids_N, "gelu", per_token)
    got = run_with_grads(routed_mlp("native", *args), tensors, torch.ones(case.T, case.D))
    expected = run_with_grads(routed_mlp("torch", *args), tensors, torch.ones(case.T, case.D))
    for name in got:
        assert got[name].dtype == expected[name].dtype
        torch.testing.assert_close(got[name], expected[name], rtol=1e-2 if dtype == torch.bfloat16 else 1e-4, atol=1e-4)


@needs_library
def test_indices_out_of_range():
    plan = kernels.plan(torch.tensor([0, 1]), 2)
    x, w, weights = torch.randn(2, 16), torch.randn(2, 16, 16), torch.ones(2)
    for tokens, given in [
        ([0, 2], plan),
        ([-1, 0], plan),
        ([0, 1], kernels.Plan(torch.tensor([0, 5]), plan.offsets_E)),
        ([0, 1], kernels.Plan(plan.order_N, torch.tensor([1, 3], dtype=torch.int32))),
        ([0, 1], kernels.Plan(plan.order_N, torch.tensor([2, 1], dtype=torch.int32))),
    ]:
        with pytest.raises(ValueError, match=r"token ids must be in 0\.\.1 and the plan must be one of 2 rows"):
            kernels.expert_mlp(
                x, torch.tensor(tokens), weights, given, w, None, w, None, activation="relu", backend="native"
            )


@needs_library
def test_large_float32_groups_are_left_to_pytorch(monkeypatch):
    asked = []
    monkeypatch.setattr(ops, "hands_over", lambda *sizes: asked.append(sizes) or hands_over(*sizes))
    for rows, dtype, expected in [
        (512, torch.float32, True),
        (511, torch.float32, False),
        (512, torch.bfloat16, False),
    ]:
        assert hands_over(dtype, rows, 2, 512, 1024) is expected
    assert not hands_over(torch.float32, 512, 2, 512, 1008)
    case = Case(512, 2, 512, 1024, 1)
    assert_measured(*three_ways(case, "relu", False, torch.float32))
    assert asked == [(torch.float32, 512, 2, 512, 1024)] * 2  # forward and backward


@needs_library
def test_what_it_refuses():
    ids = torch.tensor([0, 1])
    plan = kernels.plan(ids, 2)
    for D, H, dtype, message in [
        (16, 24, torch.float32, r"widths must be multiples of 16 in torch\.float32, got D 16 and H 24"),
        (16, 32, torch.bfloat16, r"widths must be multiples of 32 in torch\.bfloat16, got D 16 and H 32"),
        (16, 16, torch.float16, r"it knows float32 and bfloat16, got torch\.float16"),
    ]:
        x, w1, w2 = (torch.randn(shape, dtype=dtype) for shape in ((2, D), (2, H, D), (2, D, H)))
        rows = (ids, torch.ones(2), plan, w1, None, w2, None)
        with pytest.raises(ValueError, match=f"backend 'native' cannot serve expert_mlp: {message}"):
            kernels.expert_mlp(x, *rows, activation="relu", backend="native")
        assert kernels.expert_mlp(x, *rows, activation="relu").shape == (2, D)


@pytest.fixture
def fresh(monkeypatch, tmp_path):
    """As in a new process: nothing loaded, nothing compiled, nothing logged."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(registry, "_logged", set())
    for function in (library.load, library._log_missing, cache._own_temporary_folder):
        function.cache_clear()
    yield tmp_path
    for function in (library.load, library._log_missing, cache._own_temporary_folder):
        function.cache_clear()


@pytest.fixture
def unoptimised(monkeypatch):
    """For tests of what is done with the compiled file: it is compiled in a seventh of the time."""
    monkeypatch.setattr(library, "FLAGS", ["-O0" if flag == "-O3" else flag for flag in library.FLAGS])


def check_that_torch_serves(reason, caplog):
    assert fastmoe.backends()["native"] == reason
    layer = fastmoe.MoE(32, 4, 2, d_hidden=32)
    with caplog.at_level(logging.INFO, logger="fastmoe"):
        for _ in range(2):
            layer(torch.randn(3, 32)).sum().backward()
    messages = [r.getMessage() for r in caplog.records if "expert_mlp" in r.getMessage()]
    assert messages == [f"backend 'native' cannot serve expert_mlp ({reason}); falling back"]
    torch.compile(layer, fullgraph=True, backend="eager")(torch.randn(3, 32)).sum().backward()
    with pytest.raises(ValueError, match="backend 'native' cannot serve score_topk"):
        fastmoe.MoE(32, 4, 2, d_hidden=32, backend="native")(torch.randn(3, 32))


def test_no_compiler(fresh, monkeypatch, caplog):
    monkeypatch.setattr(library.shutil, "which", lambda name: None)
    check_that_torch_serves("no C++ compiler was found: g++ or c++", caplog)


def test_another_system(fresh, monkeypatch, caplog):
    monkeypatch.setattr(library.sys, "platform", "darwin")
    check_that_torch_serves("it needs Linux, whose OpenMP PyTorch shares", caplog)


def test_a_compiler_that_fails(fresh, monkeypatch, caplog):
    compiler = fresh / "g++"
    compiler.write_text('#!/bin/sh\n[ "$1" = --version ] && exit 0\necho cannot do that >&2\nexit 1\n')
    compiler.chmod(0o755)
    monkeypatch.setattr(library.shutil, "which", lambda name: str(compiler))
    check_that_torch_serves(f"{compiler} could not compile it: cannot do that", caplog)
    assert list((fresh / "cache" / "fastmoe").iterdir()) == []


def test_a_compiler_that_writes_nonsense(fresh, monkeypatch):
    compiler = fresh / "g++"
    compiler.write_text('#!/bin/sh\nwhile [ $# -gt 1 ]; do [ "$1" = -o ] && echo nonsense > "$2"; shift; done\n')
    compiler.chmod(0o755)
    monkeypatch.setattr(library.shutil, "which", lambda name: str(compiler))
    assert fastmoe.backends()["native"].startswith("it could not be built or loaded: ")


@needs_library
def test_it_is_compiled_once(fresh, unoptimised, monkeypatch):
    runs = []
    run = subprocess.run

    def counted(command, **options):
        runs.append(command)
        return run(command, **options)

    monkeypatch.setattr(library.subprocess, "run", counted)
    for _ in range(2):
        library.load.cache_clear()
        assert not isinstance(library.load(), str)
    assert sum("-o" in command for command in runs) == 1
    (compiled,) = (fresh / "cache" / "fastmoe").iterdir()
    assert compiled.suffix == ".so"


@needs_library
def test_a_damaged_file_in_the_cache_is_made_anew(fresh, unoptimised):
    compiler = library.shutil.which("g++") or library.shutil.which("c++")
    target = library.cache_folder() / f"expert_mlp-{library._fingerprint(compiler)}.so"
    target.write_bytes(b"\x7fELF and then nothing")
    assert not isinstance(library.load(), str)
    assert target.stat().st_size > 10_000


@needs_library
def test_a_cache_folder_that_cannot_be_made(fresh, unoptimised, monkeypatch):
    (fresh / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(fresh / "file"))
    assert not isinstance(library.load(), str)


@needs_library
@pytest.mark.parametrize("march", ["x86-64-v3", pytest.param("x86-64", marks=pytest.mark.slow)])
def test_on_lesser_processors(march, fresh, monkeypatch):
    """Compiled without AVX-512, and without AVX at all."""
    if "x86" not in library.platform.machine():
        pytest.skip("not an x86 processor")
    monkeypatch.setattr(library, "FLAGS", [f"-march={march}" if "march" in f else f for f in library.FLAGS])
    monkeypatch.setattr(mlp, "_amx", lambda: False)
    assert not isinstance(library.load(), str)
    for dtype in DTYPES:
        for name in ("dropped", "expert_choice", "panels", "few_rows"):
            case = fit((CASES | LARGE)[name], dtype)
            assert_measured(*three_ways(case, "swiglu", True, dtype))


@needs_library
@pytest.mark.parametrize("E", [1, 3, 70])
@pytest.mark.parametrize("N", [0, 1, 500])
def test_plan_is_the_reference_plan(E, N):
    ids = torch.randint(-1, E, (N, 2))[:, 0]
    got, expected = (kernels.plan(ids, E, backend=name) for name in ("native", "reference"))
    assert torch.equal(got.order_N, expected.order_N)
    assert torch.equal(got.offsets_E, expected.offsets_E)


@needs_library
@pytest.mark.parametrize("bad", [-2, 3, 2**40])
def test_plan_refuses_an_id_out_of_range(bad):
    with pytest.raises(ValueError, match=r"expert ids must lie in 0\.\.2"):
        kernels.plan(torch.tensor([0, bad, 1]), 3, backend="native")
