"""Models built on the meta device: each process has its own experts alone, and the values are those of any layout."""

import processes
import pytest
import torch
from processes import needs_gloo
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

import fastmoe
from fastmoe.parallel.hidden import take_hidden

D, E = 6, 7
LAYOUTS = [
    (2, ("dp", "ep"), (1, 2), "ddp"),
    (2, ("dp", "ep"), (2, 1), "fsdp"),
    (2, ("ep",), (2,), "fsdp"),
    (2, ("tp",), (2,), "ddp"),
    (4, ("dp", "ep"), (2, 2), "ddp"),
    (4, ("dp", "ep"), (2, 2), "fsdp"),
    (4, ("ep", "tp"), (2, 2), "ddp"),
]


def build(tp=False):
    """Parameters tied across layers, a buffer, an own initialisation, every kind of expert."""
    expert = {"d_hidden": 4} if tp else {"expert": lambda: nn.Sequential(nn.Linear(D, 4), nn.Linear(4, D))}
    with torch.device("meta"):
        model = nn.Sequential(
            nn.Linear(D, D),
            fastmoe.MoE(D, E, 2, d_hidden=4, activation="swiglu", shared_d_hidden=3, router="loss_free"),
            fastmoe.MoE(D, E, 2, router="noisy_topk", **expert),
            nn.BatchNorm1d(D),
            nn.Linear(D, D),
        )
    model[4].weight = model[0].weight
    return model


def expected(whole, name, model):
    """The part of a whole tensor that this process should hold."""
    index, _, rest = name.partition(".experts.")
    if not rest or "modules_list" in rest:
        return whole
    experts = model[int(index)].experts
    part = whole[experts.held.start : experts.held.stop]
    return take_hidden(experts, rest, part)


def compare(names, shape, engine):
    """The greatest difference from one process, and how many numbers the experts here have."""
    tp = "tp" in names
    reference = dict(fastmoe.materialize(build(tp), "cpu", seed=5).named_parameters())
    model = build(tp)
    fastmoe.parallelize(model, init_device_mesh("cpu", shape, mesh_dim_names=names), engine=engine)
    random_state = torch.get_rng_state()
    fastmoe.materialize(model, "cpu", seed=5)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert model[4].weight is model[0].weight
    assert torch.equal(model[3].running_var, torch.ones(D))
    assert not model[2].router.proj.weight.any()
    worst = 0.0
    for name, parameter in model.named_parameters():
        sharded = hasattr(parameter, "full_tensor")
        own = parameter.full_tensor() if sharded else parameter
        part = reference[name] if sharded else expected(reference[name], name, model)
        assert own.shape == part.shape, name
        worst = max([worst, *(own - part).abs().flatten().tolist()])
    model(torch.randn(5, D)).sum().backward()
    local = [p.to_local() if hasattr(p, "to_local") else p for p in model[1].experts.parameters()]
    return worst, sum(p.numel() for p in local)


@needs_gloo
@pytest.mark.parametrize(("world", "names", "shape", "engine"), LAYOUTS)
def test_the_values_are_those_of_one_process_and_only_own_experts_have_memory(world, names, shape, engine):
    whole = sum(p.numel() for p in build()[1].experts.parameters())
    answers = processes.run(world, compare, names, shape, engine)
    assert [worst for worst, _ in answers] == [0.0] * world
    most = -(-E // world) / E if names != ("tp",) else 0.6
    if engine == "ddp" and "dp" in names:
        most *= shape[0]
    assert all(held <= (most + 0.1) * whole for _, held in answers)


def test_seeds_and_names_decide():
    one, same, other = (fastmoe.materialize(build(), "cpu", seed=seed)[1].experts.w1 for seed in (1, 1, 2))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    assert len({float(expert[0, 0]) for expert in one.detach()}) == E


def test_a_tensor_that_is_somewhere_already_is_an_error():
    with pytest.raises(ValueError, match=r"whole model on the meta device; 0\.weight, 0\.bias are not"):
        fastmoe.materialize(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2, device="meta")), "cpu")


def test_a_module_that_cannot_initialise_itself_is_named():
    class Scale(nn.Module):
        def __init__(self):
            super().__init__()
            self.by = nn.Parameter(torch.empty(3))

    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(2, 2), Scale())
    with pytest.raises(ValueError, match=r"no reset_parameters: 1 \(Scale\)"):
        fastmoe.materialize(model, "cpu")
