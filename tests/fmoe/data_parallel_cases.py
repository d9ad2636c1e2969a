"""What each process does for the tests of `DistributedGroupedDataParallel`."""

import torch
import torch.distributed as dist
import worker_cases
from torch import nn

import fmoe
from fmoe import DistributedGroupedDataParallel

TAGS = (None, "gate", "none", "pair", "dp")


def bag_of_parameters(seed, dtype=torch.float64):
    """Parameters of every tag, the last one in another dtype."""
    torch.manual_seed(seed)
    module = nn.Module()
    module.p = nn.ParameterList(nn.Parameter(torch.randn(3, 2, dtype=dtype)) for _ in TAGS)
    module.p[-1] = nn.Parameter(torch.randn(4, dtype=torch.float32))
    for parameter, tag in zip(module.p, TAGS, strict=True):
        if tag is not None:
            parameter.dp_comm = tag
    module.register_buffer("noise", torch.randn(2))
    return module


def values(module):
    return [p.detach().clone() for p in module.p]


def synced(need_sync):
    """Parameters before and after, and the buffer's change, in a world of 3 whose last two are the group "pair"."""
    rank = dist.get_rank()
    pairs = [dist.new_group([0]), dist.new_group([1, 2])]
    module = bag_of_parameters(rank)
    before, buffer = values(module), module.noise.clone()
    DistributedGroupedDataParallel(module, need_sync=need_sync, pair_group=pairs[min(rank, 1)])
    return before, values(module), bool(module.noise.equal(buffer))


def reduced(cases):
    """For each case `(has_grad, options, dtype)` gradients before and after."""
    pairs = [dist.new_group([0]), dist.new_group([1, 2])]
    return [reduced_once(pairs, *case) for case in cases]


def reduced_once(pairs, has_grad, options, dtype):
    """`has_grad[rank]` says which parameters have a gradient."""
    rank = dist.get_rank()
    module = bag_of_parameters(0, dtype)
    model = DistributedGroupedDataParallel(module, pair_group=pairs[min(rank, 1)])
    generator = torch.Generator().manual_seed(rank)
    for p, there in zip(module.p, has_grad[rank], strict=True):
        if there:
            p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)
    before = [None if p.grad is None else p.grad.clone() for p in module.p]
    model.allreduce_gradients(**options)
    return before, [p.grad for p in module.p]


def different_modules():
    module = nn.Linear(3, 2 + dist.get_rank())
    try:
        DistributedGroupedDataParallel(module)
    except ValueError as error:
        return str(error)


def a_group_of_others():
    other = dist.new_group([0])
    try:
        DistributedGroupedDataParallel(nn.Linear(2, 2), need_sync=False, gate_group=other)
    except ValueError as error:
        return str(error)


def a_sparse_gradient():
    model = DistributedGroupedDataParallel(nn.Embedding(4, 2, sparse=True))
    model(torch.tensor([1])).sum().backward()
    try:
        model.allreduce_params()
    except ValueError as error:
        return str(error)


class Block(nn.Module):
    """A layer between two others, and one that is never used."""

    def __init__(self, layer):
        super().__init__()
        self.before, self.layer, self.unused = nn.Linear(5, 5), layer, nn.Linear(2, 2)
        self.after = nn.Linear(5, 3)

    def forward(self, x):
        return self.after(x + self.layer(self.before(x).tanh()))


def whole_model(gate):
    layer = worker_cases.whole_layer(gate)
    torch.manual_seed(17)
    return Block(layer).double()


def train(model, batches, steps, loss_weight, reduce, parameters):
    """`steps` of SGD on the sum of squares over all batches and their balance losses; parameters at the end."""
    optimizer = torch.optim.SGD(parameters, lr=0.1, weight_decay=0.01)
    gate = next(module.gate for module in model.modules() if isinstance(module, fmoe.FMoE))
    for _ in range(steps):
        optimizer.zero_grad()
        for x in batches:
            (model(x).square().sum() + loss_weight * gate.get_loss().sum()).backward()
        reduce()
        optimizer.step()
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def two_pairs(lengths, gate, steps):
    """Four processes: experts in pairs, which are copies of each other. Choices of each pass, and parameters."""
    rank = dist.get_rank()
    moe_groups = [dist.new_group(ranks) for ranks in ([0, 1], [2, 3])]
    copies = [dist.new_group(ranks) for ranks in ([0, 2], [1, 3])]
    layer = worker_cases.worker_layer(rank % 2, gate, moe_group=moe_groups[rank // 2], expert_dp_comm="expert")
    block = whole_model(gate)
    block.layer = layer
    seen = []
    layer.gate_hook = lambda ids, weights, _: seen.append(ids)
    model = DistributedGroupedDataParallel(block, expert_group=copies[rank % 2])
    x = worker_cases.batch(lengths)[rank]
    return seen, train(model, [x], steps, 1.0, model.allreduce_params, experts_slower(model))


def experts_slower(model):
    """In a pair, experts have the sum of two workers' losses, everything else the mean."""
    named = dict(model.named_parameters())
    experts = [p for name, p in named.items() if ".experts." in name]
    others = [p for name, p in named.items() if ".experts." not in name]
    return [{"params": others}, {"params": experts, "lr": 0.05, "weight_decay": 0.02}]


def both_data_parallel_ways(lengths):
    """Gradients of a model with copies of all experts, by PyTorch's wrapper and by FastMoE's."""
    x, found = worker_cases.batch(lengths)[dist.get_rank()], []
    for wrap in (nn.parallel.DistributedDataParallel, DistributedGroupedDataParallel):
        layer = worker_cases.whole_layer()
        layer.mark_parallel_comm("dp")
        model = wrap(layer)
        model(x).square().sum().backward()
        if isinstance(model, DistributedGroupedDataParallel):
            model.allreduce_params()
        found.append(worker_cases.gradients(layer))
    return found
