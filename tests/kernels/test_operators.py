"""`torch.library.opcheck`: schema, fake shapes and strides, autograd registration, AOT dispatch."""

import pytest
import torch
from helpers import CASES, mlp_tensors, route

from fastmoe import kernels


def arguments(name):
    case = CASES[name]
    token_ids_N, expert_ids_N, rows_per_token = route(case)
    plan = kernels.plan(expert_ids_N, case.E)
    tensors = mlp_tensors(case, len(token_ids_N), "swiglu", True, torch.float32)
    return expert_ids_N, case, plan, token_ids_N, rows_per_token, tensors


ORDER = ("x", "weights", "w1", "b1", "w2", "b2")


@pytest.mark.parametrize("name", ["odd", "dropped", "no_token"])
def test_operators(name):
    expert_ids_N, case, plan, token_ids_N, rows_per_token, tensors = arguments(name)
    ops = torch.ops.fastmoe
    torch.library.opcheck(ops.plan, (expert_ids_N, case.E, "torch"))
    torch.library.opcheck(ops.plan, (expert_ids_N, case.E, "native"))
    leaves = [tensors[n].requires_grad_() for n in ORDER]
    rest = (token_ids_N, plan.order_N, plan.offsets_E)
    torch.library.opcheck(ops.expert_mlp, (*leaves, *rest, "swiglu", rows_per_token, "torch", True))
    rows = torch.randn(len(token_ids_N), case.D, requires_grad=True)
    torch.library.opcheck(ops.grouped_mm, (rows, tensors["w1"], tensors["b1"], plan.offsets_E, "torch"))


def test_backward_operators():
    _, case, plan, token_ids_N, rows_per_token, tensors = arguments("dropped")
    ops = torch.ops.fastmoe
    args = [tensors[n] for n in ORDER]
    rest = (token_ids_N, plan.order_N, plan.offsets_E)
    _, pre_NH = ops.expert_mlp(*args, *rest, "swiglu", rows_per_token, "torch", True)
    for needed in ([True] * 6, [False, True] * 3):
        grad = torch.randn(case.T, case.D)
        torch.library.opcheck(
            ops.expert_mlp_backward, (grad, *args, *rest, pre_NH, "swiglu", rows_per_token, "torch", needed)
        )
    rows, grad = torch.randn(len(token_ids_N), case.D), torch.randn(len(token_ids_N), 2 * case.H)
    for needed in ([True] * 3, [False, True, False]):
        torch.library.opcheck(ops.grouped_mm_backward, (grad, rows, tensors["w1"], plan.offsets_E, "torch", needed))


def test_fake_strides_are_real_strides():
    """A transposed x or weight: what the compiler is told must be what it gets."""
    _, case, plan, token_ids_N, rows_per_token, tensors = arguments("odd")
    turned = {n: t.mT.contiguous().mT if t.dim() > 1 else t for n, t in tensors.items()}
    assert not turned["x"].is_contiguous()
    leaves = [turned[n].requires_grad_() for n in ORDER]
    rest = (token_ids_N, plan.order_N, plan.offsets_E)
    torch.library.opcheck(torch.ops.fastmoe.expert_mlp, (*leaves, *rest, "swiglu", rows_per_token, "torch", True))
    _, pre_NH = torch.ops.fastmoe.expert_mlp(*leaves, *rest, "swiglu", rows_per_token, "torch", True)
    args = [leaf.detach() for leaf in leaves]
    backward_args = (
        torch.randn(case.T, case.D),
        *args,
        *rest,
        pre_NH.detach(),
        "swiglu",
        rows_per_token,
        "torch",
        [True] * 6,
    )
    torch.library.opcheck(torch.ops.fastmoe.expert_mlp_backward, backward_args)
