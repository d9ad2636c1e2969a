"""Ours, and the ways to compute the same in plain PyTorch."""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastmoe import kernels
from fastmoe.bench.problem import Contender, Problem, RefusedError


def ours(p: Problem, backend: str = "auto") -> Contender:
    """`kernels.expert_mlp`, as a layer calls it, plan included."""
    if backend != "auto" and (reason := kernels.backends()[backend]) != "available":
        raise RefusedError(reason)
    return Contender(lambda: p.routed_mlp(backend, *p.leaves), p.leaves, p.grad_TD, p.grads)


def brute_force(p: Problem) -> Contender:
    """Stacked weights, one boolean mask per expert over all routed rows, as FastMoE's own tests had it."""
    T, E, D, _, K = p.shape

    def forward() -> Tensor:
        rows_ND = p.x_TD.repeat_interleave(K, dim=0)
        out_ND = torch.zeros_like(rows_ND)
        ids_N = p.ids_TK.reshape(-1)
        for e in range(E):
            mask_N = ids_N == e
            hidden = kernels.activate(p.activation, rows_ND[mask_N] @ p.w1[e].t())
            out_ND[mask_N] = hidden @ p.w2[e].t()
        return (out_ND.view(T, K, D) * p.weights_TK.unsqueeze(2).to(p.dtype)).sum(1)

    return Contender(forward, p.leaves, p.grad_TD, p.grads)


class _Expert(nn.Module):
    def __init__(self, w1: Tensor, w2: Tensor, activation: str) -> None:
        super().__init__()
        self.w1, self.w2 = (nn.Linear(w.shape[1], w.shape[0], bias=False, device="meta") for w in (w1, w2))
        self.w1.weight, self.w2.weight = (nn.Parameter(w.detach()) for w in (w1, w2))  # no copy
        self.activation = activation

    def forward(self, rows_RD: Tensor) -> Tensor:
        return self.w2(kernels.activate(self.activation, self.w1(rows_RD)))


def module_list(p: Problem) -> Contender:
    """One module per expert; rows found by `torch.where`, results added by `index_add`, as most MoE code does it."""
    experts = nn.ModuleList(_Expert(w1, w2, p.activation) for w1, w2 in zip(p.w1, p.w2, strict=True))

    def forward() -> Tensor:
        y_TD = torch.zeros_like(p.x_TD)
        for e, mlp in enumerate(experts):
            token, k = torch.where(p.ids_TK == e)
            if len(token):
                weighted = mlp(p.x_TD[token]) * p.weights_TK[token, k, None].to(p.dtype)
                y_TD = y_TD.index_add(0, token, weighted)
        return y_TD

    def grads() -> list[Tensor]:
        def stack(name: str) -> Tensor:
            params = [getattr(mlp, name).weight for mlp in experts]
            return torch.stack([torch.zeros_like(w) if w.grad is None else w.grad for w in params])

        return [*p.grads()[:2], stack("w1"), stack("w2")]

    return Contender(forward, [p.x_TD, p.weights_TK, *experts.parameters()], p.grad_TD, grads)


def grouped_mm(p: Problem) -> Contender:
    """`F.grouped_mm` under autograd: rows sorted by expert and put back, nothing fused, no wait for a GPU."""
    T, E, D, _, K = p.shape
    if not hasattr(F, "grouped_mm"):
        raise RefusedError(f"torch {torch.__version__} has no F.grouped_mm")
    experts_E = torch.arange(E, device=p.device)

    def forward() -> Tensor:
        sorted_N, order_N = p.ids_TK.reshape(-1).sort(stable=True)
        offsets_E = torch.searchsorted(sorted_N, experts_E, right=True).to(torch.int32)
        rows_ND = p.x_TD[p.token_N[order_N]]
        hidden_NH = kernels.activate(p.activation, F.grouped_mm(rows_ND, p.w1.transpose(1, 2), offs=offsets_E))
        out_ND = F.grouped_mm(hidden_NH, p.w2.transpose(1, 2), offs=offsets_E)
        back_N = torch.empty_like(order_N).index_copy_(0, order_N, torch.arange(len(order_N), device=p.device))
        return (out_ND[back_N].view(T, K, D) * p.weights_TK.unsqueeze(2).to(p.dtype)).sum(1)

    return Contender(forward, p.leaves, p.grad_TD, p.grads)


def dense(p: Problem) -> Contender:
    """A dense MLP on T*K rows: the same floating-point operations, one expert's weights. A bound, not a peer."""
    K = p.shape[4]
    w1, w2 = (w[0].detach().clone().requires_grad_() for w in (p.w1, p.w2))
    rows_ND = p.x_TD.detach().repeat_interleave(K, dim=0).requires_grad_()
    upstream = p.grad_TD.repeat_interleave(K, dim=0)

    def forward() -> Tensor:
        return F.linear(kernels.activate(p.activation, F.linear(rows_ND, w1)), w2)

    return Contender(forward, [rows_ND, w1, w2], upstream, None)


def each_backend() -> dict[str, Callable[[Problem], Contender]]:
    """Ours with each backend by name but the reference, which is the ground truth."""
    return {f"fastmoe ({name})": partial(ours, backend=name) for name in kernels.backends() if name != "reference"}
