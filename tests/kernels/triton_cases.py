"""What the tests of the `triton` backend share. They run on a GPU where there is one, else by Triton's interpreter."""

import torch
from helpers import cast, mlp_tensors, route, routed_mlp, run_with_grads

from fastmoe import kernels
from fastmoe.kernels.triton import mlp
from fastmoe.kernels.triton.tiles import Tile

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPES = [torch.float32, torch.float16]
if DEVICE.type == "cuda":  # the interpreter has no bfloat16 products
    DTYPES.append(torch.bfloat16)
KINDS = [("gelu", True), ("swiglu", False)]

# few and large steps, for the interpreter counts them
LARGE = Tile(64, 64, 64, group=2, warps=4, stages=1)


def moved(tensors):
    return {name: None if t is None else t.to(DEVICE) for name, t in tensors.items()}


def routed(case):
    """`helpers.route`, and a plan by the reference."""
    token_ids_N, expert_ids_N, per_token = route(case)
    plan = kernels.plan(expert_ids_N.to(DEVICE), case.E, backend="reference")
    return token_ids_N.to(DEVICE), expert_ids_N.to(DEVICE), per_token, plan


def three_ways(through, tensors, upstream):
    """`through("triton")`, the reference in the same dtype, and in float64; outputs and every gradient."""
    dtype = next(iter(tensors.values())).dtype
    tensors, upstream = moved(tensors), upstream.to(DEVICE, dtype)
    got = run_with_grads(through("triton"), tensors, upstream)
    plain = run_with_grads(through("reference"), tensors, upstream)
    exact = run_with_grads(through("reference"), cast(tensors, torch.float64), upstream)
    return got, plain, exact


def mlp_inputs(case, activation, bias, dtype, per_token=True):
    """`(through, tensors, upstream)` of an expert MLP."""
    token_ids_N, expert_ids_N, given = route(case)
    tensors = mlp_tensors(case, len(token_ids_N), activation, bias, dtype)
    args = (case, token_ids_N.to(DEVICE), expert_ids_N.to(DEVICE), activation, given * per_token)
    return lambda backend: routed_mlp(backend, *args), tensors, torch.randn(case.T, case.D)


def mlp_three_ways(*args, **options):
    return three_ways(*mlp_inputs(*args, **options))


def use_tile(monkeypatch, tile):
    """Every product by one tile (None: by `F.grouped_mm`), or by that of its kind; the answer lists what was asked."""
    asked = []

    def choose(problem, *rest, **options):
        asked.append(problem.kind)
        return tile[problem.kind] if isinstance(tile, dict) else tile

    monkeypatch.setattr(mlp, "choose_tile", choose)
    return asked


def assert_equal(got, expected):
    """The same bits for every name."""
    assert got.keys() == expected.keys()
    for name in expected:
        assert torch.equal(got[name], expected[name]), name


def with_own_strides(tensors):
    """Views of the same values, none of them contiguous."""
    spread = {name: t.detach().repeat_interleave(2, -1) for name, t in tensors.items()}
    turned = {name: t.mT.contiguous().mT if t.dim() > 1 else t for name, t in spread.items()}
    strided = {name: t[..., ::2] for name, t in turned.items()}
    assert not any(t.is_contiguous() for t in strided.values())
    return strided


def assert_strides_do_not_matter(function, tensors, upstream):
    """The same bits from views as from what they show, and from an expanded upstream gradient."""
    tensors, upstream = moved(tensors), upstream.to(DEVICE)
    strided = {name: t.requires_grad_() for name, t in with_own_strides(tensors).items()}
    out = function(**strided)
    got = torch.autograd.grad(out, list(strided.values()), with_own_strides({"": upstream})[""])
    expected = run_with_grads(function, tensors, upstream)
    assert_equal({"out": out, **dict(zip(strided, got, strict=True))}, expected)
    leaves = {name: t.clone().requires_grad_() for name, t in tensors.items()}
    got = torch.autograd.grad(function(**leaves).sum(), list(leaves.values()))  # an expanded gradient
    expected = run_with_grads(function, tensors, torch.ones_like(upstream))
    assert_equal(dict(zip(leaves, got, strict=True)), {name: expected[name] for name in leaves})
