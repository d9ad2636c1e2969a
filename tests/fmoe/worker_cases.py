"""What each of two processes computes for the tests of `fmoe`, and the whole that they are compared with."""

import copy
import functools

import plain_loops
import torch
import torch.distributed as dist

import fmoe
from fmoe import functions, gates
from fmoe.gates.utils import limit_by_capacity

D, H, EACH, WORLD = 5, 7, 2, 2
GATES = {
    "naive": gates.NaiveGate,
    "noisy": gates.NoisyGate,
    "gshard": functools.partial(gates.GShardGate, random_routing=False, capacity=(9, 9)),
    "dc": functools.partial(gates.DCGate, random_routing=False, capacity=(0.7, 0.7)),
    "switch": functools.partial(gates.SwitchGate, switch_eps=0, capacity=(0.7, 0.7)),
}


def whole_layer(gate="naive", **options):
    """All experts in one process."""
    torch.manual_seed(11)
    top_k = 1 if gate == "switch" else 2
    return fmoe.FMoETransformerMLP(EACH * WORLD, D, H, gate=GATES[gate], top_k=top_k, **options).double().train(False)


def worker_layer(rank, gate="naive", **options):
    """A worker's part of `whole_layer`."""
    whole = whole_layer(gate)
    layer = fmoe.FMoETransformerMLP(EACH, D, H, gate=GATES[gate], top_k=whole.top_k, world_size=WORLD, **options)
    layer = layer.double().train(False)
    layer.gate.load_state_dict(whole.gate.state_dict())
    for e, expert in enumerate(layer.experts):
        expert.load_state_dict(whole.experts[rank * EACH + e].state_dict())
    return layer


def batch(lengths, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(sum(lengths), D, generator=generator, dtype=torch.float64).split(lengths)


def found(layer, x, y, upstream):
    """Output and gradients, by name; the gate's are this process's own."""
    y.backward(upstream)
    return {"out": y.detach(), "x": x.grad} | gradients(layer)


def gradients(module):
    """By name; zeros where nothing came."""
    return {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in module.named_parameters()}


def run_layer(lengths, gate):
    rank = dist.get_rank()
    layer, x = worker_layer(rank, gate), batch(lengths)[rank].requires_grad_()
    seen = []
    layer.gate_hook = lambda ids, weights, _: seen.append(ids)
    result = found(layer, x, layer(x), batch(lengths, seed=1)[rank])
    layer.zero_grad()
    layer.gate(x.detach())
    loss = layer.gate.get_loss()
    loss.sum().backward()
    return result, seen[0], loss.detach(), gradients(layer.gate)


def run_without_input_gradient(lengths):
    layer, x = worker_layer(dist.get_rank()), batch(lengths)[dist.get_rank()]
    with torch.no_grad():
        quiet = layer(x)
    out = layer(x)
    assert out.equal(quiet)
    out.sum().backward()
    return gradients(layer)


def run_slices(length, option):
    rank, group = dist.get_rank(), dist.group.WORLD
    layer = worker_layer(rank, moe_group=group, **{option: group})
    layer.mask = torch.tensor([0, 1] + [0] * (length - 2))
    layer.mask_dict = {1: 2.0}
    x = batch([length])[0].requires_grad_()
    return found(layer, x, layer(x), batch([length], seed=1)[0])


class Pairs(gates.NaiveGate):
    def forward(self, inp):
        return super().forward(inp["rows"])


class PairExpert(plain_loops.RowExpert):
    def forward(self, inp, fwd_expert_count):
        return [self.linear(inp["rows"]) * inp["numbers"], {"rows": inp["rows"][:, :2]}]


def pair_layer(num_expert, world_size):
    torch.manual_seed(11)
    layer = fmoe.FMoE(num_expert, D, world_size, gate=Pairs, expert=PairExpert).double()
    for expert in layer.experts:
        torch.nn.init.ones_(expert.linear.weight)
        torch.nn.init.zeros_(expert.linear.bias)
    torch.nn.init.eye_(layer.gate.gate.weight)
    return layer


def run_pairs(layer, x):
    x = x.clone().requires_grad_()
    product, rest = layer({"rows": x, "numbers": torch.arange(len(x)).view(-1, 1)})
    (product.square().sum() + rest["rows"].sum()).backward()
    return product.detach(), rest["rows"].detach(), x.grad


def pairs_of_worker(lengths):
    return run_pairs(pair_layer(EACH, WORLD), batch(lengths)[dist.get_rank()])


def run_functions(choices):
    """Rows out and back by hand; each row is multiplied by 1 + the number of its expert."""
    rank, world = (dist.get_rank(), 2) if dist.is_initialized() else (0, 1)
    ids_TK = torch.tensor(choices[rank])
    functions.ensure_comm(ids_TK, None)
    pos, sent, came, counts, size = functions.prepare_forward(ids_TK, EACH * WORLD // world, world)
    x = torch.arange(1.0, len(ids_TK) + 1, dtype=torch.float64).unsqueeze(1).add(100 * rank).requires_grad_()
    rows = functions.MOEScatter.apply(x, pos // ids_TK.shape[1], sent, came, size, world)
    first = rank * EACH * WORLD // world
    factors = torch.arange(first + 1, first + 1 + len(counts)).repeat_interleave(counts).unsqueeze(1)
    out = functions.MOEGather.apply(rows * factors, pos, sent, came, ids_TK.numel(), world)
    out.sum().backward()
    lean = functions.count_by_gate(ids_TK, EACH * WORLD // world, world, require_pos=False)
    return pos, (sent, came, counts, size), lean, rows.detach(), out.detach(), x.grad


def run_slice_and_gather(length):
    rank, group = dist.get_rank(), dist.group.WORLD
    x = torch.arange(float(length)).requires_grad_()
    part = functions.Slice.apply(x, rank, 2, group)
    whole = functions.AllGather.apply(part * part, rank, 2, group)
    whole.backward(torch.arange(1.0, length + 1))
    return part.detach(), whole.detach(), x.grad


def run_limit(wanted, capacities):
    rank, ids = dist.get_rank(), torch.tensor(wanted)
    functions.ensure_comm(ids, None)
    return limit_by_capacity(ids[rank], EACH, WORLD, torch.tensor(capacities[rank]))


def run_swipe(wanted, capacities, bias):
    rank = dist.get_rank()
    gate = gates.SwipeGate(D, EACH, WORLD)
    return gate.swipe_once(torch.tensor(wanted[rank]), torch.tensor(capacities[rank]), bias)


def run_swipe_gate(length, top_k):
    torch.manual_seed(11)
    gate = gates.SwipeGate(D, EACH, WORLD, top_k).double()
    torch.nn.init.constant_(gate.gate.bias[:EACH], 9.0)
    x = batch([length] * WORLD)[dist.get_rank()]
    return *gate(x), gate.gate(x).detach()


def run_faster(lengths, fraction):
    """A layer whose gate is of two nodes with a worker each: choices, output, loss."""
    rank, whole = dist.get_rank(), whole_layer()
    gate = gates.gen_faster_gate(rank, workers_per_node=1, outgoing_fraction=fraction)
    layer = worker_layer(rank)
    layer.gate = gate(D, EACH, WORLD).double()
    layer.gate.load_state_dict(whole.gate.state_dict())
    seen = []
    layer.gate_hook = lambda ids, weights, _: seen.append(ids)
    out = layer(batch(lengths)[rank])
    return seen[0], out.detach(), layer.gate.get_loss().detach()


def run_copy():
    """A layer's copy on a worker: whether it shares the group, and what both answer."""
    group = dist.group.WORLD
    layer = worker_layer(dist.get_rank(), "dc", moe_group=group, slice_group=group)
    twin = copy.deepcopy(layer)
    twin.experts[0].htoh4.weight.data.zero_()
    twin.load_state_dict(layer.state_dict())
    shared = all(one is group for one in (twin.moe_group, twin.slice_group, twin.gate.moe_group))
    x = batch([4])[0]
    return shared, layer(x).detach(), twin(x).detach()
