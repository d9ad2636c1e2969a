"""Every kernel once, forward and backward, on a small case: `python small_case.py cuda`."""

import sys

import torch

from fastmoe import kernels
from fastmoe.bench.problem import Problem


def main(device: str) -> None:
    small = device == "cpu"
    for dtype in (torch.float16,) if small else (torch.float32, torch.bfloat16):
        p = Problem((9, 3, 16, 16, 2) if small else (137, 5, 48, 40, 2), dtype, "swiglu", device)
        y_TD = p.routed_mlp("triton", *p.leaves)
        y_TD.backward(p.grad_TD)
        assert all(t.isfinite().all() for t in (y_TD, *p.grads()))
    logits_TE = torch.randn(9, 5, device=device, requires_grad=True)
    scores, weights, ids = kernels.score_topk(logits_TE, 2, backend="triton")
    (scores.sum() + weights.square().sum()).backward()
    plan = kernels.plan(ids.reshape(-1), 5, backend="triton")
    rows = torch.randn(18, 16, device=device, requires_grad=True)
    out = kernels.grouped_mm(rows, torch.randn(5, 24, 16, device=device), plan.offsets_E, backend="triton")
    tokens = torch.arange(9, device=device).repeat_interleave(2)
    kernels.combine(out, tokens, weights.detach().reshape(-1), plan, 9, backend="triton").sum().backward()
    assert rows.grad is not None
    assert rows.grad.isfinite().all()


if __name__ == "__main__":
    main(sys.argv[1])
