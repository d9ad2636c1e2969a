"""Models to be checked, right and wrong ones, and processes that check them."""

from functools import partial

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

import fastmoe
from fastmoe.check import check_layout, demo

D, ROWS = 6, 8


class Expert(nn.Linear):
    """Of every second process the output is another."""

    def __init__(self, wrong=0.0):
        super().__init__(D, D)
        self.wrong = wrong

    def forward(self, x):
        return super().forward(x) * (1 + self.wrong * (dist.get_rank() % 2))


class Net(nn.Module):
    def __init__(self, wrong=0.0, dropout=0.0, jitter=0.0):
        super().__init__()
        switch = {"router": "switch", "router_options": {"jitter": jitter, "capacity_factor": 1.0}}
        self.first, self.drop, self.last = nn.Linear(D, D), nn.Dropout(dropout), nn.Linear(D, D)
        self.moe = fastmoe.MoE(D, 3, 1, expert=lambda: Expert(wrong), **switch)
        self.register_buffer("seen", torch.zeros(()))
        self.counts = 1

    def forward(self, x):
        self.seen += self.counts
        x = self.drop(self.first(x))
        return {"y": self.last(x + self.moe(x)), "moe": x, "loss": x.sum()}


class Odd(nn.Linear):
    """So many rows more than it was given."""

    def __init__(self, more):
        super().__init__(D, D)
        self.more = more

    def forward(self, x):
        return torch.cat([super().forward(x), x.new_zeros(self.more, D)])


def loss(output, x, target):
    return F.mse_loss(output["y"], target)


def total(output, x, target):
    return loss(output, x, target) * len(x)


def problem(loss=loss, rows=ROWS, **options):
    return Net(**options), (torch.randn(rows, D), torch.randn(rows, D)), loss


def tied_layers():
    one, other = fastmoe.MoE(D, 3, d_hidden=4), fastmoe.MoE(D, 3, d_hidden=4)
    other.experts.w1 = one.experts.w1
    return nn.Sequential(one, nn.Linear(D, D), other), torch.randn(ROWS, D), lambda output, x: output.square().mean()


def other_gradient():
    model, *rest = problem()
    rank = dist.get_rank()
    model.first.weight.register_hook(lambda grad: grad * (1 + 1e-6 * rank))
    return model, *rest


def other_buffer():
    model, *rest = problem()
    model.counts += dist.get_rank()
    return model, *rest


def not_a_number():
    model, *rest = problem()
    rank = dist.get_rank()
    model.last.register_forward_hook(lambda *args: args[-1] / (rank != 1))
    return model, *rest


def other_batch():
    return problem(rows=ROWS * (1 + dist.get_rank()))


def broken():
    if dist.get_rank() == 1:
        raise KeyError("weights")
    return problem()


FACTORIES = {
    "demo": demo,
    "demo stacked": partial(demo, module_experts=False),
    "own": problem,
    "wrong expert": partial(problem, wrong=1e-6),
    "dropout": partial(problem, dropout=0.5),
    "jitter": partial(problem, jitter=0.1),
    "sum": partial(problem, total),
    "odd rows": partial(problem, rows=7),
    "no rows": partial(problem, rows=0),
    "no gradient": lambda: (nn.ReLU(), torch.randn(8, D), lambda output, x: output.mean()),
    "zero gradient": lambda: (nn.Linear(D, D), torch.randn(8, D), lambda output, x: (output * 0).mean()),
    "infinite loss": lambda: (nn.Linear(D, D), torch.randn(8, D), lambda output, x: output.mean() / 0),
    "loss of each row": lambda: (nn.Linear(D, D), torch.randn(8, D), lambda output, x: output.mean(1)),
    "same parameters": partial(lambda kept: (nn.Sequential(kept), *problem()[1:]), nn.Linear(D, D)),
    "not three": lambda: nn.Linear(D, D),
    "no module": lambda: (torch.randn(2), torch.randn(8, D), loss),
    "no tensors": lambda: (nn.Linear(D, D), [1, 2], loss),
    "other lengths": lambda: (nn.Linear(D, D), (torch.randn(8, D), torch.randn(4, D)), loss),
    "other output": lambda: (Odd(1), torch.randn(8, D), lambda output, x: output.mean()),
    "fixed output": lambda: (Odd(8), torch.randn(8, D), lambda output, x: output.mean()),
} | {
    f.__name__.replace("_", " "): f
    for f in (tied_layers, other_gradient, other_buffer, not_a_number, other_batch, broken)
}


def check(name, mesh, **options):
    """What a check found, as plain values."""
    sizes = dict(part.split("=") for part in mesh.split())
    over = init_device_mesh("cpu", tuple(map(int, sizes.values())), mesh_dim_names=tuple(sizes))
    if "dtype" in options:
        options["dtype"] = getattr(torch, options["dtype"])
    try:
        report = check_layout(FACTORIES[name], over, **options)
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"}
    failed = [[d.quantity, d.name] for d in report.failed]
    worst = {quantity: [d.layout, d.alone] for quantity, d in report.worst().items()}
    return {"passed": report.passed, "random": report.random, "failed": failed, "worst": worst, "text": str(report)}


def check_all(jobs):
    """What each check found; a job is `(name, mesh, options)`."""
    return [check(name, mesh, **options) for name, mesh, options in jobs]
