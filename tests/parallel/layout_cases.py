"""The same training on one process and on any mesh, and what must then be the same."""

import math
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import cache, cached_property

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.utils.checkpoint import checkpoint

import fastmoe
from fastmoe.routers import noise

D, LENGTH, STEPS, VOCABULARY = 6, 3, 3, 11
MAX_NORM = 0.5


class Choosy(fastmoe.Router):
    """One's own: nothing goes to the first expert, nor to the last."""

    def forward(self, x_TD):
        left_out = torch.tensor([0, self.num_experts - 1])
        weights_TK, ids_TK = self.proj(x_TD).softmax(1).index_fill(1, left_out, -1).topk(self.top_k)
        return fastmoe.Routing.from_topk(ids_TK, weights_TK, self.num_experts)


class Constant(nn.Module):
    """An expert whose output does not depend on its input."""

    def __init__(self):
        super().__init__()
        self.value = nn.Parameter(torch.rand(D))

    def forward(self, rows_ND):
        return self.value.expand(len(rows_ND), D)


class Zero(nn.Module):
    """An expert without parameters whose output does not depend on its input."""

    def forward(self, rows_ND):
        return torch.zeros_like(rows_ND)


def small():
    return nn.Sequential(nn.Linear(D, 4), nn.Tanh(), nn.Linear(4, D))


def frozen():
    return nn.Linear(D, D).requires_grad_(False)


MIXED = [nn.Identity, lambda: nn.Linear(D, D), small, lambda: nn.Linear(D, D, bias=False)]
KINDS = {
    "stacked": {"d_hidden": 4},
    "no_bias": {"d_hidden": 4, "bias": False},
    "gated": {"d_hidden": 4, "activation": "swiglu", "shared_d_hidden": 3},
    "gated_no_bias": {"d_hidden": 4, "activation": "swiglu", "bias": False},
    "prelu": {"d_hidden": 4, "activation": nn.PReLU},
    "modules": {"expert": [small]},
    "mixed": {"expert": MIXED},
    "constant": {"expert": [Constant, Zero, frozen]},
    "frozen": {"d_hidden": 4},
}
ROUTERS = {
    "topk": {"z_loss_weight": 0.1, "aux_loss_weight": 0.1},
    "switch": {"capacity_factor": 0.9, "jitter": 0.0, "aux_loss_weight": 0.1},
    "noisy_topk": {},
    "expert_choice": {"capacity_factor": 1.25},
    "soft": {"slots_per_expert": 2},
    "loss_free": {"bias_update_rate": 0.05, "sequence_loss_weight": 0.1},
    "hash": {"vocab_size": VOCABULARY},
    "no_losses": {"aux_loss_weight": 0.0},
    "choosy": None,
}


@dataclass(frozen=True)
class Case:
    """A model, a batch, and how both are spread over processes.

    Attributes:
        mesh: (name, size) of each dimension.
        shares: how many sequences each process of the batch has.
        model: "between": the MoE layer between two linear maps; "first": nothing before it; "checkpointed": it is run
            again in backward; "blocks": two blocks.
        micro_steps: of each step, all but the last without synchronisation.
    """

    mesh: tuple[tuple[str, int], ...]
    router: str = "topk"
    kind: str = "stacked"
    num_experts: int = 5
    shares: tuple[int, ...] = (7,)
    engine: str = "ddp"
    tp: str = "hidden"
    chunks: int = 1
    suppress_duplicates: bool = False
    model: str = "between"
    micro_steps: int = 1

    def __str__(self):
        words = [f"{name}{size}" for name, size in self.mesh] + [self.engine, self.router, self.kind]
        words += [f"E{self.num_experts}", "-".join(map(str, self.shares))]
        words += [self.tp] if "tp" in dict(self.mesh) else []
        words += [f"chunks{self.chunks}"] if self.chunks > 1 else []
        words += ["suppress"] if self.suppress_duplicates else []
        words += [self.model] if self.model != "between" else []
        return "_".join(words + (["micro"] if self.micro_steps > 1 else []))

    def size(self, name):
        return dict(self.mesh).get(name, 1)

    @cached_property
    def world(self):
        return math.prod(size for _, size in self.mesh)

    def place(self, rank):
        """Where a process stands along dp, ep and tp."""
        ep, tp = self.size("ep"), self.size("tp")
        return rank // (ep * tp), rank // tp % ep, rank % tp

    def sequences(self, rank):
        """The numbers of the sequences that a process has."""
        part = rank // self.size("tp")
        start = sum(self.shares[:part])
        return range(start, start + self.shares[part])

    def routed(self, rank):
        """The numbers of the sequences that it routes."""
        own = self.sequences(rank)
        if self.tp != "slice":
            return own
        tp, i = self.size("tp"), rank % self.size("tp")
        return own[len(own) * i // tp : len(own) * (i + 1) // tp]

    def held(self, rank):
        """The numbers of the experts that it holds."""
        _, i, k = self.place(rank)
        number = self.size("ep")
        if self.tp == "slice":
            number, i = number * self.size("tp"), i * self.size("tp") + k
        each = -(-self.num_experts // number)
        return range(self.num_experts)[i * each : (i + 1) * each]

    @property
    def alone(self):
        """All that one process without a mesh need know."""
        return self.router, self.kind, self.num_experts, sum(self.shares), self.model


class Between(nn.Module):
    def __init__(self, moe, first):
        super().__init__()
        self.first, self.moe, self.last = first, moe, nn.Linear(D, D)

    def forward(self, x, **tokens):
        return self.last(self.moe(self.first(x), **tokens))


class Checkpointed(Between):
    def forward(self, x, **tokens):
        return self.last(checkpoint(self.moe, self.first(x), **tokens, use_reentrant=False))


class Block(nn.Module):
    def __init__(self, moe):
        super().__init__()
        self.norm, self.moe = nn.LayerNorm(D), moe

    def forward(self, x, **tokens):
        y = self.moe(self.norm(x), **tokens)
        y += x
        return y


class Blocks(nn.Module):
    def __init__(self, moes):
        super().__init__()
        self.blocks = nn.ModuleList(map(Block, moes))

    def forward(self, x, **tokens):
        for block in self.blocks:
            x = block(x, **tokens)
        return x


def build(router, kind, num_experts, _sequences, model):
    """The whole model, the same wherever it is built."""
    torch.manual_seed(3)
    options = dict(KINDS[kind])
    if "expert" in options:
        options["expert"] = [options["expert"][e % len(options["expert"])] for e in range(num_experts)]
    if kind == "prelu":
        options["activation"] = nn.PReLU(init=0.3)
    top_k = 1 if router == "switch" else 2

    def layer():
        chosen = {"router": Choosy} if router == "choosy" else {"router": router, "router_options": ROUTERS[router]}
        if router == "no_losses":
            chosen["router"] = "topk"
        moe = fastmoe.MoE(D, num_experts, top_k, **options, **chosen)
        for parameter in moe.router.parameters():
            nn.init.normal_(parameter)
        return moe.requires_grad_(kind != "frozen")

    if model == "blocks":
        return Blocks([layer(), layer()]).double()
    kind = Checkpointed if model == "checkpointed" else Between
    return kind(layer(), nn.Identity() if model == "first" else nn.Linear(D, D)).double()


def batch(step, sequences):
    """x, the gradient from above, which tokens are padding (in one step), and ids, of the whole batch."""
    generator = torch.Generator().manual_seed(step)
    x, upstream = torch.randn(2, sequences, LENGTH, D, dtype=torch.float64, generator=generator)
    mask = torch.rand(sequences, LENGTH, generator=generator) < (0.8 if step == 1 else 2)
    return x, upstream, mask, torch.randint(VOCABULARY, (sequences, LENGTH), generator=generator)


@contextmanager
def shared_noise(first_token):
    """What a process draws is its tokens' part of one draw for the whole batch."""
    draws = iter(range(1000))

    def normal(like):
        generator = torch.Generator().manual_seed(next(draws))
        everyone = torch.randn(64, *like.shape[1:], generator=generator, dtype=torch.float64)
        return everyone[first_token : first_token + len(like)].to(like.dtype)

    before, noise.normal = noise.normal, normal
    try:
        yield
    finally:
        noise.normal = before


def local(tensor):
    return (tensor.to_local() if hasattr(tensor, "to_local") else tensor).detach().clone()


def gradient(parameter):
    """Of this process's part; what has no numbers may have no gradient."""
    if parameter.grad is None and parameter.requires_grad and not local(parameter).numel():
        return local(parameter)
    return None if parameter.grad is None else local(parameter.grad)


def run_step(model, step, total, own, scale, micro_steps):
    """Outputs and figures of one step's forward and backward passes. The last step adds the balance losses itself."""
    tensors = [whole[own.start : own.stop] for whole in batch(step, total)]
    parts = [
        [t[len(own) * i // micro_steps : len(own) * (i + 1) // micro_steps] for t in tensors]
        for i in range(micro_steps)
    ]
    outputs, counts, losses = [], [], {}
    for i, (x, upstream, mask, ids) in enumerate(parts):
        with ExitStack() as stack:
            if i + 1 < micro_steps and scale is not None:
                stack.enter_context(fastmoe.no_sync(model))
            collected = stack.enter_context(fastmoe.collect_aux_losses(model) if step == 2 else nullcontext())
            y = model(x, token_mask=None if step != 1 else mask, token_ids=ids)
            loss = (y * upstream).sum() * (scale or 1)
            (loss if collected is None else loss + collected.total()).backward()
            outputs.append(y.detach())
        stats = fastmoe.stats(model)
        counts.append(torch.stack([torch.cat([one.counts, torch.tensor([one.dropped])]) for one in stats.values()]))
    for name, one in stats.items():
        losses |= {f"{name}.{loss}": torch.tensor(value, dtype=torch.float64) for loss, value in one.losses.items()}
    return {"y": torch.cat(outputs), "losses": losses, "counts": sum(counts)}


def train(model, case, rank=None):
    """All that can be seen of some steps on one process of the case's mesh; where rank is None, on one without."""
    total = sum(case.shares)
    own, routed, scale, micro_steps = range(total), range(total), None, 1
    if rank is not None:
        own, routed = case.sequences(rank), case.routed(rank)
        scale, micro_steps = len(case.shares), case.micro_steps
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    seen = []
    with shared_noise(routed.start * LENGTH):
        for step in range(STEPS):
            optimizer.zero_grad()
            found = run_step(model, step, total, own, scale, micro_steps)
            found["norm"] = fastmoe.clip_grad_norm_(model, MAX_NORM)
            found["grads"] = {name: gradient(p) for name, p in model.named_parameters()}
            optimizer.step()
            found["weights"] = {n: local(p) for n, p in model.named_parameters()}
            found["buffers"] = {n: b.clone() for n, b in model.named_buffers()}
            seen.append(found)
    return seen


@cache
def mesh_of(shape):
    names, sizes = zip(*shape, strict=True)
    return init_device_mesh("cpu", sizes, mesh_dim_names=names)


def spread(case):
    """The model of a case, parallel. Of processes that are to be alike only the first has it right to begin with."""
    model = build(*case.alone)
    rank = dist.get_rank()
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if tensor.is_floating_point() and (case.place(rank)[0] if expert_in(name) else rank):
                tensor += rank
    blocks = {"blocks": (Block,)} if case.model == "blocks" and case.engine == "fsdp" else {}
    return fastmoe.parallelize(
        model,
        mesh_of(case.mesh),
        engine=case.engine,
        tp=case.tp,
        chunks=case.chunks,
        suppress_duplicates=case.suppress_duplicates,
        **blocks,
    )


def train_all(cases):
    """On every process of a world."""
    return [train(spread(case), case, dist.get_rank()) for case in cases]


@cache
def alone(*described):
    """The same training on one process."""
    return train(build(*described), Case((), shares=(described[3],)))


def expert_in(name):
    """What follows `experts.` in the name of a parameter of the routed experts, as a list; else an empty one."""
    path = name.partition(".experts.")[2].split(".")
    return path if path[0] in ("w1", "b1", "w2", "b2", "modules_list") else []


def parts_of(case, rank, wholes):
    """What a process must hold of some parameters, by the layout alone."""
    held, parts = case.held(rank), {}
    for name, whole in wholes.items():
        path = expert_in(name)
        if path[:1] != ["modules_list"] or int(path[1]) in held:
            parts[name] = None if whole is None else part_of(case, rank, path, whole)
    return parts


def part_of(case, rank, path, whole):
    i, j, k = case.place(rank)
    held, tp, part = case.held(rank), case.size("tp"), whole
    if path and path[0] != "modules_list":
        part = part[held.start : held.stop]
        if case.tp == "hidden" and path[0] != "b2":
            dim = 2 if path[0] == "w2" else 1
            halves = part.chunk(2, dim) if "gated" in case.kind and dim == 1 else [part]
            part = torch.cat([half.chunk(tp, dim)[k] for half in halves], dim)
    if case.engine == "fsdp":
        number, i = (case.size("dp"), i) if path else (case.size("dp") * case.size("ep"), i * case.size("ep") + j)
        chunks = part.chunk(number)
        part = chunks[i] if i < len(chunks) else part[:0]
    return part


def assert_close(got, expected, what):
    if isinstance(expected, dict):
        assert got.keys() == expected.keys(), what
        for name in expected:
            assert_close(got[name], expected[name], f"{what}, {name}")
    elif expected is None or got is None:
        assert got is expected, what
    else:
        assert (got.shape, got.dtype) == (expected.shape, expected.dtype), what
        if not torch.allclose(got, expected, rtol=1e-10, atol=1e-10):
            torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10, msg=lambda m: f"{what}: {m}")


def assert_as_one(case, by_rank):
    """`by_rank`: what `train` saw on each process."""
    for step, expected in enumerate(alone(*case.alone)):
        for rank, found in enumerate(seen[step] for seen in by_rank):
            where = f"step {step}, process {rank}"
            own = case.sequences(rank)
            assert_close(found["y"], expected["y"][own.start : own.stop], f"{where}, y")
            for name in ("losses", "buffers"):
                assert_close(found[name], expected[name], f"{where}, {name}")
            assert_close(found["norm"].double(), expected["norm"].double(), f"{where}, norm")
            for name in ("grads", "weights"):
                assert_close(found[name], parts_of(case, rank, expected[name]), f"{where}, {name}")
        alike = 1 if case.tp == "slice" else case.size("tp")
        total = sum(seen[step]["counts"] for seen in by_rank[::alike])
        assert torch.equal(total, expected["counts"]), f"step {step}"
