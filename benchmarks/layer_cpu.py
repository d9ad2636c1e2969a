"""The speed of one MoE layer on this machine, beside plain PyTorch ways to compute the same.

    python benchmarks/layer_cpu.py                         # every shape; writes benchmarks/results/layer_cpu.json
    python benchmarks/layer_cpu.py --rounds 3 --shapes 1   # a quick look at the second shape

All contenders have the same weights and the same routing, run in one process, interleaved round by round, and are
timed only after their output and gradients were found equal to the reference backend's. The routed MLP is timed: rows
in, weighted sums out; the router is the same for all and left out. Medians, and medians of the rounds' ratios (the
brute-force loop runs twice where a run takes seconds: there the ratio of the medians).
"""

import argparse
import dataclasses
import gc
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastmoe import kernels
from fastmoe.bench.machine import machine

# T tokens, E experts, D model width, H expert hidden width, K experts chosen per token
SHAPES = [(2048, 8, 512, 1024, 2), (2048, 64, 512, 1024, 2), (1024, 256, 256, 512, 2), (4096, 512, 64, 128, 2)]
OURS, BRUTE, MODULES, GROUPED, DENSE = "fastmoe", "brute-force loop", "ModuleList loop", "F.grouped_mm", "dense MLP"
SECONDS_PER_BRUTE_RUN = 3.0  # the brute-force loop is timed in fewer rounds where one run takes longer


@dataclasses.dataclass
class Problem:
    """One shape: tokens, routing and weights that every contender shares."""

    shape: tuple[int, int, int, int, int]
    dtype: torch.dtype

    def __post_init__(self) -> None:
        T, E, D, H, K = self.shape
        torch.manual_seed(0)
        self.x_TD = torch.randn(T, D, dtype=self.dtype).requires_grad_()
        scores_TE = torch.randn(T, E).softmax(1)
        weights_TK, self.ids_TK = scores_TE.topk(K)
        self.weights_TK = (weights_TK / weights_TK.sum(1, keepdim=True)).requires_grad_()
        self.w1 = (torch.randn(E, H, D) / D**0.5).to(self.dtype).requires_grad_()
        self.w2 = (torch.randn(E, D, H) / H**0.5).to(self.dtype).requires_grad_()
        self.grad_TD = torch.randn(T, D).to(self.dtype)
        self.token_N = torch.arange(T).repeat_interleave(K)


@dataclasses.dataclass
class Contender:
    """`forward()` gives `(T, D)`; `leaves` are the tensors that backward fills."""

    forward: Callable[[], Tensor]
    leaves: list[Tensor]
    upstream: Tensor
    stacked_grads: Callable[[], list[Tensor]] | None  # (dx, dweights, dw1, dw2), None if not comparable

    def step(self) -> None:
        for leaf in self.leaves:
            leaf.grad = None
        self.forward().backward(self.upstream)


def shared_grads(p: Problem) -> Callable[[], list[Tensor]]:
    return lambda: [t.grad for t in (p.x_TD, p.weights_TK, p.w1, p.w2)]


def ours(p: Problem, backend: str = "auto") -> Contender:
    _, E, _, _, K = p.shape

    def forward() -> Tensor:
        plan = kernels.plan(p.ids_TK.reshape(-1), E, backend=backend)
        return kernels.expert_mlp(
            p.x_TD, p.token_N, p.weights_TK.reshape(-1), plan, p.w1, None, p.w2, None,
            activation="gelu", rows_per_token=K, backend=backend,
        )  # fmt: skip

    return Contender(forward, [p.x_TD, p.weights_TK, p.w1, p.w2], p.grad_TD, shared_grads(p))


def brute_force(p: Problem) -> Contender:
    """Stacked weights, one boolean mask per expert over all routed rows, as FastMoE's own tests had it."""
    T, E, D, _, K = p.shape

    def forward() -> Tensor:
        rows_ND = p.x_TD.repeat_interleave(K, dim=0)
        out_ND = torch.zeros_like(rows_ND)
        ids_N = p.ids_TK.reshape(-1)
        for e in range(E):
            mask_N = ids_N == e
            hidden = F.gelu(rows_ND[mask_N] @ p.w1[e].t())
            out_ND[mask_N] = hidden @ p.w2[e].t()
        return (out_ND.view(T, K, D) * p.weights_TK.unsqueeze(2).to(p.dtype)).sum(1)

    return Contender(forward, [p.x_TD, p.weights_TK, p.w1, p.w2], p.grad_TD, shared_grads(p))


def module_list(p: Problem) -> Contender:
    """One module per expert; rows found by `torch.where`, results added by `index_add`, as most MoE code does it."""
    _, E, D, H, _ = p.shape

    def expert(e: int) -> nn.Module:
        mlp = nn.Sequential(nn.Linear(D, H, bias=False), nn.GELU(), nn.Linear(H, D, bias=False)).to(p.dtype)
        mlp[0].weight.data.copy_(p.w1[e].detach())
        mlp[2].weight.data.copy_(p.w2[e].detach())
        return mlp

    experts = nn.ModuleList(expert(e) for e in range(E))

    def forward() -> Tensor:
        y_TD = torch.zeros_like(p.x_TD)
        for e, mlp in enumerate(experts):
            token, k = torch.where(p.ids_TK == e)
            if len(token):
                weighted = mlp(p.x_TD[token]) * p.weights_TK[token, k, None].to(p.dtype)
                y_TD = y_TD.index_add(0, token, weighted)
        return y_TD

    def grads() -> list[Tensor]:
        def stack(i: int, like: Tensor) -> Tensor:
            found = [mlp[i].weight.grad for mlp in experts]  # type: ignore[index]
            return torch.stack([torch.zeros_like(like[0]) if g is None else g for g in found])

        return [p.x_TD.grad, p.weights_TK.grad, stack(0, p.w1), stack(2, p.w2)]

    return Contender(forward, [p.x_TD, p.weights_TK, *experts.parameters()], p.grad_TD, grads)


def grouped_mm(p: Problem) -> Contender:
    """`F.grouped_mm` under autograd, rows sorted by expert."""
    _, E, _, _, _ = p.shape

    def forward() -> Tensor:
        ids_N = p.ids_TK.reshape(-1)
        order_N = torch.argsort(ids_N, stable=True)
        offsets_E = torch.bincount(ids_N, minlength=E).cumsum(0).to(torch.int32)
        rows_ND = p.x_TD[p.token_N[order_N]]
        hidden_NH = F.gelu(F.grouped_mm(rows_ND, p.w1.transpose(1, 2), offs=offsets_E))
        out_ND = F.grouped_mm(hidden_NH, p.w2.transpose(1, 2), offs=offsets_E)
        weighted_ND = out_ND * p.weights_TK.reshape(-1)[order_N].unsqueeze(1).to(p.dtype)
        return torch.zeros_like(p.x_TD).index_add(0, p.token_N[order_N], weighted_ND)

    return Contender(forward, [p.x_TD, p.weights_TK, p.w1, p.w2], p.grad_TD, shared_grads(p))


def dense(p: Problem) -> Contender:
    """A dense MLP on T*K rows: the same floating-point operations, one expert's weights. A bound, not a peer."""
    K = p.shape[4]
    w1, w2 = (w[0].detach().clone().requires_grad_() for w in (p.w1, p.w2))
    rows_ND = p.x_TD.detach().repeat_interleave(K, dim=0).requires_grad_()
    upstream = p.grad_TD.repeat_interleave(K, dim=0)
    return Contender(lambda: F.linear(F.gelu(F.linear(rows_ND, w1)), w2), [rows_ND, w1, w2], upstream, None)


def check(p: Problem, name: str, contender: Contender, truth: list[Tensor]) -> float:
    """The largest relative error of output and gradients; stops the benchmark where it is too large."""
    if contender.stacked_grads is None:
        return 0.0
    contender.step()
    with torch.no_grad():
        got = [contender.forward(), *contender.stacked_grads()]
    errors = [float((g.double() - t).norm() / t.norm()) for g, t in zip(got, truth, strict=True)]
    limit = 1e-5 if p.dtype == torch.float32 else 3e-2
    if not max(errors) < limit:
        raise SystemExit(f"{name} is wrong on {p.shape} {p.dtype}: relative errors {errors}")
    return max(errors)


def reference_results(p: Problem) -> list[Tensor]:
    """Output and gradients of the reference backend in float64, from the same rounded inputs."""
    exact = Problem(p.shape, torch.float64)
    exact.ids_TK = p.ids_TK
    for mine, theirs in ((exact.x_TD, p.x_TD), (exact.w1, p.w1), (exact.w2, p.w2), (exact.weights_TK, p.weights_TK)):
        mine.data.copy_(theirs.detach())
    contender = ours(exact, "reference")
    y_TD = contender.forward()
    return [y_TD.detach(), *torch.autograd.grad(y_TD, contender.leaves, p.grad_TD.double())]


def timed(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def measure(contenders: dict[str, Contender], rounds: int) -> dict[str, dict[str, list[float]]]:
    """Seconds of each run, contenders taking turns; the slow brute-force loop sits out rounds it would hold up."""
    times: dict[str, dict[str, list[float]]] = {name: {"forward": [], "forward+backward": []} for name in contenders}
    for round_number in range(rounds):
        for name, contender in contenders.items():
            spent = times[name]["forward+backward"]
            if name == BRUTE and round_number >= 1 and spent[0] > SECONDS_PER_BRUTE_RUN:
                continue
            with torch.no_grad():
                times[name]["forward"].append(timed(contender.forward))
            times[name]["forward+backward"].append(timed(contender.step))
            for leaf in contender.leaves:
                leaf.grad = None
        gc.collect()
    return times


def ratio(theirs: list[float], ours: list[float]) -> float:
    """Median of the rounds' ratios; ratio of the medians where a contender sat out rounds."""
    if len(theirs) < len(ours):
        return statistics.median(theirs) / statistics.median(ours)
    return statistics.median(t / o for t, o in zip(theirs, ours, strict=True))


def run(shape: tuple[int, int, int, int, int], dtype: torch.dtype, rounds: int) -> dict:
    p = Problem(shape, dtype)
    makers = {OURS: ours, GROUPED: grouped_mm, MODULES: module_list, DENSE: dense, BRUTE: brute_force}
    contenders = {name: make(p) for name, make in makers.items()}
    truth = reference_results(p)
    errors = {}
    for name, contender in contenders.items():
        errors[name] = check(p, name, contender, truth)  # also the warm-up
    times = measure(contenders, rounds)
    row: dict = {"shape": dict(zip("TEDHK", shape, strict=True)), "dtype": str(dtype).removeprefix("torch.")}
    row["max_relative_error"] = errors
    for mode in ("forward", "forward+backward"):
        row[mode] = {
            name: {
                "median_ms": statistics.median(runs[mode]) * 1e3,
                "min_ms": min(runs[mode]) * 1e3,
                "rounds": len(runs[mode]),
                "times_ours": ratio(runs[mode], times[OURS][mode]),
            }
            for name, runs in times.items()
        }
    return row


def show(row: dict) -> None:
    shape = ", ".join(f"{letter} {size}" for letter, size in row["shape"].items())
    for mode in ("forward", "forward+backward"):
        cells = [f"{name} {r['median_ms']:.1f} ms ({r['times_ours']:.2f}x)" for name, r in row[mode].items()]
        print(f"{shape}, {row['dtype']}, {mode}: {' | '.join(cells)}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--shapes", type=int, nargs="*", default=list(range(len(SHAPES))), help="indices into SHAPES")
    parser.add_argument("--dtypes", nargs="*", default=["float32", "bfloat16"])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "layer_cpu.json")
    args = parser.parse_args()
    result = {"machine": machine(), "rounds": args.rounds, "rows": []}
    for index in args.shapes:
        for dtype in args.dtypes:
            result["rows"].append(run(SHAPES[index], getattr(torch, dtype), args.rounds))
            show(result["rows"][-1])
    args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
