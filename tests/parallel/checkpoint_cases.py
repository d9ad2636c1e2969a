"""A model with everything that a checkpoint must know of, and what processes do with it."""

import os
import signal
import threading

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

import fastmoe
from fastmoe import load, parallelize, save
from fastmoe.parallel.checkpoint_planner import PieceSavePlanner

D, TOKENS = 6, 12
STEPS = 2


class Scaled(nn.Module):
    """An expert with a buffer and a parameter of one number."""

    def __init__(self):
        super().__init__()
        self.linear, self.bias = nn.Linear(D, D), nn.Parameter(torch.rand(1))
        self.register_buffer("scale", torch.rand(D))

    def forward(self, x):
        return self.linear(x) * self.scale + self.bias


class Net(nn.Module):
    """Stacked experts, experts of two kinds, tied weights, buffers that are kept and that are not."""

    def __init__(self, stacked=5, modules=5):
        super().__init__()
        self.first, self.last = nn.Linear(D, D), nn.Linear(D, D, bias=False)
        self.last.weight = self.first.weight
        self.stacked = fastmoe.MoE(D, stacked, 2, d_hidden=4, activation="swiglu", shared_d_hidden=4)
        kinds = [(nn.Linear(D, D), Scaled())[e % 2] for e in range(modules)]
        self.listed = fastmoe.MoE(D, modules, 2, expert=kinds) if modules else nn.Identity()
        self.register_buffer("kept", torch.rand(D))
        self.register_buffer("left", torch.rand(D), persistent=False)

    def forward(self, x):
        return self.last(x + self.listed(x + self.stacked(self.first(x) * self.kept)))


class Factored(torch.optim.Optimizer):
    """State of every kind: means over the last dimension, a whole copy, a tensor of one number, a plain number."""

    def __init__(self, params, lr=0.01):
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in (p for p in group["params"] if p.grad is not None):
                state = self.state[p]
                if not state:
                    state |= {"mean": torch.zeros_like(p[..., :1]), "last": torch.zeros_like(p)}
                    state |= {"step": torch.zeros(1), "count": 0, "nothing": None}
                state["mean"].lerp_(p.grad.square().mean(-1, keepdim=True), 0.5)
                state["last"].copy_(p.grad)
                state["step"] += 1
                state["count"] += 1
                p -= group["lr"] * state["last"] / (state["mean"].sqrt() + state["count"])


def build(seed=0, **numbers):
    torch.manual_seed(seed)
    return Net(**numbers).double()


def optimizer_of(model, kind="AdamW"):
    if kind == "Factored":
        return Factored(model.parameters())
    groups = [[p for n, p in model.named_parameters() if n.endswith("weight") is weight] for weight in (True, False)]
    return torch.optim.AdamW([{"params": groups[0], "weight_decay": 0.1}, {"params": groups[1]}], lr=0.01)


def batch():
    generator = torch.Generator().manual_seed(5)
    return [torch.randn(TOKENS, D, dtype=torch.float64, generator=generator) for _ in range(2)]


def train(model, optimizer, steps, part=0, parts=1):
    """Losses of the whole batch, of which this process has one of `parts`."""
    x, target = (t.tensor_split(parts)[part] for t in batch())
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = (model(x) - target).square().sum() * parts
        loss.backward()
        optimizer.step()
        loss = loss.detach()
        if dist.is_initialized():
            dist.all_reduce(loss)
            loss /= dist.get_world_size()
        losses.append(loss.item())
    return losses


def trained(kind="AdamW", **numbers):
    model = build(**numbers)
    optimizer = optimizer_of(model, kind)
    train(model, optimizer, STEPS)
    return model, optimizer


def sharded(layout, seed, kind="AdamW", **numbers):
    """A model and its optimizer on a layout such as "dp2.ep2.fsdp"; and which part of the batch is this process's."""
    *sizes, engine = layout.split(".")
    names = tuple(size[:2] for size in sizes)
    mesh = init_device_mesh("cpu", tuple(int(size[2:]) for size in sizes), mesh_dim_names=names)
    model = parallelize(build(seed, **numbers), mesh, engine=engine)
    tp = mesh["tp"].size() if "tp" in names else 1
    return model, optimizer_of(model, kind), (dist.get_rank() // tp, dist.get_world_size() // tp)


def state_of(model, optimizer):
    """All of both, on one process, by name."""
    names = {param: name for name, param in model.named_parameters()}
    state = {f"{names[p]}.{key}": value for p, own in optimizer.state.items() for key, value in own.items()}
    return {f"model.{k}": v for k, v in model.state_dict().items()} | {f"optimizer.{k}": v for k, v in state.items()}


def assert_same(got, expected):
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        if isinstance(value, torch.Tensor):
            assert got[name].dtype == value.dtype, name
            assert torch.equal(got[name], value), name
        else:
            assert got[name] == value, name


def error_of(call, *args, **kwargs):
    try:
        call(*args, **kwargs)
    except Exception as error:
        return [type(error).__name__, str(error)]
    return None


def round_trips(folder, trips, kind="AdamW", stacked=5):
    """Each trip: load a checkpoint on a layout, save it there, train."""
    losses = []
    for source, layout, target in trips:
        numbers = {"stacked": stacked} | ({"modules": 0} if "tp" in layout else {})
        model, optimizer, part = sharded(layout, 1, kind, **numbers)
        train(model, optimizer, 1, *part)
        extra = load(model, optimizer, folder / source)
        with torch.no_grad():
            model(batch()[0][:3])  # FSDP leaves the outermost parameters gathered
        save(model, optimizer, folder / target, extra=extra)
        losses.append(train(model, optimizer, STEPS, *part))
    return losses


def errors(folder):
    """What goes wrong on one process must be raised by both, and leave things as they were."""
    rank = dist.get_rank()
    model, optimizer, part = sharded("ep2.ddp", 1)
    train(model, optimizer, 1, *part)
    before = {name: value.clone() for name, value in state_of(model, optimizer).items()}
    found = {
        "extra": error_of(save, model, optimizer, folder / "new", extra=object() if rank else None),
        "taken": error_of(save, model, optimizer, folder / "single"),
        "absent": error_of(load, model, optimizer, folder / "absent"),
        "no optimizer": error_of(load, model, optimizer, folder / "bare"),
        "fewer": error_of(load, model, optimizer, folder / "fewer"),
        "more": error_of(load, model, optimizer, folder / "more"),
        "names": error_of(load, model, optimizer, folder / "names"),
    }
    if rank:
        own = next(iter(model.listed.experts.parameters()))
        optimizer.state[own]["odd"] = object()
    found["state"] = error_of(save, model, optimizer, folder / "new")
    if rank:
        del optimizer.state[own]["odd"]
        del optimizer.state[model.stacked.experts.w1]["exp_avg"]
        before.pop("optimizer.stacked.experts.w1.exp_avg")
    found["part"] = error_of(save, model, optimizer, folder / "new")
    assert_same(state_of(model, optimizer), before)
    return found


def background(folder):
    """Nothing is written until training has gone on; then once more: the second save waits for the first."""
    model, optimizer, part = sharded("ep2.fsdp", 1)
    load(model, optimizer, folder / "single")
    resolve, trained_on = PieceSavePlanner.resolve_data, threading.Event()
    PieceSavePlanner.resolve_data = lambda *args: trained_on.wait(60) and resolve(*args)
    save(model, optimizer, folder / "while", asynchronous=True)
    train(model, optimizer, 1, *part)
    trained_on.set()
    pending = save(model, optimizer, folder / "after", asynchronous=True)
    first = (folder / "while").is_dir()
    losses = train(model, optimizer, 1, *part)
    pending.wait()
    second = (folder / "after").is_dir()
    load(model, optimizer, folder / "after")
    return [first, second, losses == train(model, optimizer, 1, *part)]


def killed(folder):
    """The second process dies while it writes."""
    model, optimizer, _ = sharded("ep2.ddp", 1)
    if dist.get_rank() == 1:
        resolve, calls = PieceSavePlanner.resolve_data, []

        def dying(planner, item):
            calls.append(item)
            if len(calls) == 4:
                os.kill(os.getpid(), signal.SIGKILL)
            return resolve(planner, item)

        PieceSavePlanner.resolve_data = dying
    save(model, optimizer, folder / "kept", extra="new", overwrite=True)
