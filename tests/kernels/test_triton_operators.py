"""The operators of the `triton` backend under `torch.compile` and `torch.library.opcheck`."""

import pytest
import torch
from helpers import CASES, GRADS, Case, mlp_tensors

pytest.importorskip("triton")

from triton_cases import DEVICE, assert_equal, moved, routed

from fastmoe import kernels


def test_compiled_as_a_whole_it_gives_the_same_numbers():
    torch._dynamo.reset()
    for case in (Case(9, 4, 8, 6, 2, "dropped"), Case(5, 4, 8, 6, 2)):
        token_ids_N, expert_ids_N, per_token, _ = routed(case)
        tensors = moved(mlp_tensors(case, len(token_ids_N), "swiglu", True, torch.float32))

        def function(ids, x, weights, w1, b1, w2, b2, token_ids_N=token_ids_N, per_token=per_token):
            plan = kernels.plan(ids, 4, backend="triton")
            options = {"activation": "swiglu", "rows_per_token": per_token, "backend": "triton"}
            y = kernels.expert_mlp(x, token_ids_N, weights, plan, w1, b1, w2, b2, **options)
            rows = kernels.grouped_mm(x[token_ids_N][plan.order_N], w1, plan.offsets_E, b1, backend="triton")
            z = kernels.combine(rows, token_ids_N, weights, plan, len(x), backend="triton")
            scores, chosen, _ = kernels.score_topk(x, 2, "sigmoid", backend="triton")
            return y.sin(), z.sin(), scores.sin(), chosen.sin()

        found = []
        for run in (function, torch.compile(function, fullgraph=True, backend="aot_eager")):
            leaves = {name: t.clone().requires_grad_() for name, t in tensors.items()}
            outs = run(expert_ids_N, **leaves)
            torch.manual_seed(3)
            sum((out * torch.randn(out.shape).to(DEVICE)).sum() for out in outs).backward()
            found.append({name: leaf.grad for name, leaf in leaves.items()})
            found[-1] |= {str(i): out.detach() for i, out in enumerate(outs)}
        assert_equal(*found)
    torch._dynamo.reset()


@pytest.mark.parametrize("name", ["odd", "no_token"])  # pre-activations of dropped rows would be of any value
def test_operators(name):
    """`torch.library.opcheck`: schema, fake shapes and strides, autograd registration, AOT dispatch."""
    case, ops = CASES[name], torch.ops.fastmoe
    token_ids_N, expert_ids_N, per_token, plan = routed(case)
    tensors = moved(mlp_tensors(case, len(token_ids_N), "swiglu", True, torch.float32))
    leaves = [tensors[n].requires_grad_() for n in GRADS]
    rest = (token_ids_N, plan.order_N, plan.offsets_E)
    rows = torch.randn(len(token_ids_N), case.D, device=DEVICE, requires_grad=True)
    logits = torch.randn(case.T, case.E, device=DEVICE, requires_grad=True)
    torch.library.opcheck(ops.plan, (expert_ids_N, case.E, "triton"))
    torch.library.opcheck(ops.expert_mlp, (*leaves, *rest, "swiglu", per_token, "triton", True))
    torch.library.opcheck(ops.grouped_mm, (rows, tensors["w1"], tensors["b1"], plan.offsets_E, "triton"))
    torch.library.opcheck(ops.combine, (rows, tensors["weights"], *rest, case.T))
    torch.library.opcheck(ops.score_topk, (logits, 2, True, True))


@pytest.mark.parametrize("name", ["dropped", "no_token"])
def test_backward_operators(name):
    case, ops = CASES[name], torch.ops.fastmoe
    token_ids_N, _, per_token, plan = routed(case)
    tensors = moved(mlp_tensors(case, len(token_ids_N), "swiglu", True, torch.float32))
    args, rest = [tensors[n] for n in GRADS], (token_ids_N, plan.order_N, plan.offsets_E)
    grad_TD, grad_NW = torch.randn(case.T, case.D).to(DEVICE), torch.randn(len(token_ids_N), 2 * case.H).to(DEVICE)
    rows = torch.randn(len(token_ids_N), case.D, device=DEVICE)
    _, pre_NH = ops.expert_mlp(*args, *rest, "swiglu", per_token, "triton", True)
    for needed in ([True] * 6, [False, True] * 3):
        mlp = (grad_TD, *args, *rest, pre_NH, "swiglu", per_token, "triton", needed)
        torch.library.opcheck(ops.expert_mlp_backward, mlp)
        product = (grad_NW, rows, tensors["w1"], plan.offsets_E, "triton", needed[:3])
        torch.library.opcheck(ops.grouped_mm_backward, product)
        torch.library.opcheck(ops.combine_backward, (grad_TD, rows, tensors["weights"], *rest, needed[:2]))
    logits = torch.randn(case.T, case.E, device=DEVICE)
    scores, weights, ids = ops.score_topk(logits, 2, False, True)
    upstream = torch.randn(case.T, case.E).to(DEVICE), torch.randn(case.T, 2).to(DEVICE)
    torch.library.opcheck(ops.score_topk_backward, (*upstream, logits, scores, weights, ids, False, True))
