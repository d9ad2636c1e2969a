"""What cannot work is a ValueError on every process, before anything changes or hangs."""

import time

import pytest
import torch
import torch.distributed as dist
from processes import needs_gloo, run
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

import fastmoe
from fastmoe.parallel import Layout, shard_layer

pytestmark = needs_gloo

D = 6
SECONDS = 20  # the machine may be busy; a hang lasts until the group's 60


def build(extra=0, freeze=False, dtype=torch.float64, buffer=False, **options):
    layer = fastmoe.MoE(D, **({"num_experts": 4, "top_k": 2} | options))
    model = nn.Sequential(nn.Linear(D, D), layer, *(nn.Linear(D, D) for _ in range(extra))).to(dtype)
    if buffer:
        model.register_buffer("kept", torch.zeros(2))
    model[0].bias.requires_grad_(not freeze)
    return model


def mesh(**sizes):
    return init_device_mesh("cpu", tuple(sizes.values()), mesh_dim_names=tuple(sizes))


def attempt(model, mesh, **options):
    """What `parallelize` raised, how long it took, and whether the model is as it was."""
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    start = time.monotonic()
    try:
        fastmoe.parallelize(model, mesh, **options)
        raised = "nothing", ""
    except Exception as error:
        raised = type(error).__name__, str(error)
    after = dict(model.named_parameters())
    same = before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    return *raised, time.monotonic() - start, same


def assert_refused(by_rank, *words):
    for name, message, seconds, same in by_rank:
        assert name == "ValueError", (name, message)
        assert all(word in message for word in words), message
        assert seconds < SECONDS
        assert same, "the model was changed"


# what the second process gives to the model, to the mesh and to parallelize; what the message says of both
DIFFERENT = {
    "width": ({"d_hidden": 5}, {}, {}, "d_hidden=24", "d_hidden=5"),
    "experts": ({"num_experts": 5}, {}, {}, "4 experts", "5 experts"),
    "top_k": ({"top_k": 1}, {}, {}, "top_k=2", "top_k=1"),
    "router": ({"router": "loss_free"}, {}, {}, "TopKRouter", "LossFreeRouter"),
    "router_option": ({"router_options": {"z_loss_weight": 0.5}}, {}, {}, "z_loss_weight=0.0", "z_loss_weight=0.5"),
    "activation": ({"activation": "relu"}, {}, {}, "gelu", "relu"),
    "kind": ({"expert": lambda: nn.Linear(D, D)}, {}, {}, "MLPExperts", "ModuleExperts"),
    "shared": ({"shared_d_hidden": 3}, {}, {}, "nothing more", "'1.shared.w1.weight'"),
    "one_more": ({"extra": 1}, {}, {}, "nothing more", "'2.weight'"),
    "frozen": ({"freeze": True}, {}, {}, "'0.bias'", "frozen"),
    "dtype": ({"dtype": torch.float32}, {}, {}, "float64", "float32"),
    "buffer": ({"buffer": True}, {}, {}, "nothing more", "'kept'"),
    "mesh": ({}, {"dp": 2}, {}, "ep=2", "dp=2"),
    "mesh_shape": ({}, {"dp": 2, "ep": 1}, {}, "ep=2", "dp=2, ep=1"),
    "engine": ({}, {}, {"engine": "fsdp"}, "engine='ddp'", "engine='fsdp'"),
    "no_engine": ({}, {}, {"engine": "zero"}, "engine='ddp'", "engine='zero'"),
    "chunks": ({}, {}, {"chunks": 2}, "chunks=1", "chunks=2"),
    "no_chunks": ({}, {}, {"chunks": 0}, "chunks=1", "chunks=0"),
    "suppress": ({}, {}, {"suppress_duplicates": True}, "duplicates=False", "duplicates=True"),
    "tp": ({}, {}, {"tp": "slice"}, "tp='hidden'", "tp='slice'"),
    "blocks": ({}, {}, {"blocks": (nn.Linear,)}, "blocks=[]", "Linear"),
    "options": ({}, {}, {"bucket_cap_mb": 1}, "options={}", "bucket_cap_mb"),
}


def attempt_all():
    """One after another in one world: whatever is refused leaves the processes able to go on."""
    found = {}
    for name, (model, sizes, options, *_words) in DIFFERENT.items():
        if dist.get_rank() == 0:
            model, sizes, options = {}, {}, {}
        found[name] = attempt(build(**model), mesh(**(sizes or {"ep": 2})), **options)
    found["the same"] = attempt(build(), mesh(ep=2))[:2]
    return found


@pytest.fixture(scope="module")
def refused():
    return run(2, attempt_all)


@pytest.mark.parametrize("name", DIFFERENT)
def test_what_differs_is_named_on_every_process(refused, name):
    assert_refused([found[name] for found in refused], "process 0", "process 1", *DIFFERENT[name][3:])


def test_the_same_is_taken_after_all_that(refused):
    assert [found["the same"] for found in refused] == [("nothing", "")] * 2


def tied(first, second):
    """Four experts, of which two are one."""
    experts = [nn.Linear(D, D) for _ in range(4)]
    experts[second] = experts[first]
    return build(expert=experts)


def twice(num_experts=4, **sizes):
    return fastmoe.parallelize(build(num_experts=num_experts), mesh(**sizes))


def partly():
    """A model of which one layer is sharded already, but not the first."""
    model = nn.Sequential(build(), build())
    shard_layer(model[1][1], Layout(mesh(ep=4)))
    return model


def two(**second):
    """Two layers, of which the first alone would do."""
    return nn.Sequential(build(), build(**second))


CUSTOM, PRELU, MODULE = {"activation": torch.tanh}, {"activation": nn.PReLU()}, {"expert": lambda: nn.Linear(D, D)}

# what every process gives, and what each is told
WRONG = {
    "order": (build, {"ep": 2, "dp": 2}, {}, ["dp, ep, tp, in this order", "('ep', 'dp')"]),
    "name": (build, {"dp": 2, "model": 2}, {}, ["dp, ep, tp", "'model'"]),
    "no_names": (build, None, {}, ["named", "no names"]),
    "engine": (build, {"ep": 4}, {"engine": "zero"}, ["engine", "'zero'", "ddp", "fsdp"]),
    "chunks": (build, {"ep": 4}, {"chunks": 0}, ["chunks", "0"]),
    "chunks_float": (build, {"ep": 4}, {"chunks": 1.5}, ["chunks", "1.5"]),
    "tp": (build, {"ep": 2, "tp": 2}, {"tp": "rows"}, ["tp", "'rows'", "hidden", "slice"]),
    "twice_ddp": (lambda: twice(dp=4), {"dp": 4}, {}, ["parallel already"]),
    "twice_ep": (lambda: twice(ep=4), {"dp": 4}, {}, ["parallel already"]),
    "twice_uneven": (lambda: twice(5, ep=4), {"dp": 4}, {}, ["parallel already"]),
    "wrapped": (lambda: nn.Sequential(twice(dp=4)), {"ep": 4}, {}, ["parallel already"]),
    "partly": (partly, {"ep": 4}, {}, ["'1.1'", "parallel already"]),
    "blocks": (build, {"ep": 4}, {"blocks": (nn.Linear,)}, ["blocks", "fsdp"]),
    "tp_fsdp": (build, {"ep": 2, "tp": 2}, {"engine": "fsdp"}, ["fsdp", "tp"]),
    "fsdp_tp": (build, {"tp": 4}, {"engine": "fsdp", "tp": "slice"}, ["fsdp", "tp"]),
    "tied": (lambda: tied(0, 2), {"dp": 2, "ep": 2}, {}, ["[0, 2]", "share a parameter"]),
    "tied_elsewhere": (lambda: tied(0, 1), {"ep": 4}, {}, ["[0, 1]", "share a parameter"]),
    "custom": (lambda: two(**CUSTOM), {"ep": 2, "tp": 2}, {}, ["'1.1'", "named activation", "tp='slice'"]),
    "prelu": (lambda: two(**PRELU), {"ep": 2, "tp": 2}, {}, ["'1.1'", "named activation", "tp='slice'"]),
    "modules": (lambda: two(**MODULE), {"tp": 4}, {}, ["'1.1'", "built-in experts", "tp='slice'"]),
    "width": (lambda: two(d_hidden=6), {"tp": 4}, {}, ["'1.1'", "d_hidden", "tp=4", "6"]),
    "dropout": (lambda: two(dropout=0.1), {"tp": 4}, {}, ["'1.1'", "dropout"]),
}


def attempt_shapes():
    """(dp, ep) of the first process and of the second."""
    return attempt(build(), mesh(dp=2, ep=1) if dist.get_rank() == 0 else mesh(dp=1, ep=2))


def test_meshes_of_other_shapes():
    assert_refused(run(2, attempt_shapes), "process 0", "dp=2, ep=1", "process 1", "dp=1, ep=2")


def attempt_wrong():
    found = {}
    for name, (make, sizes, options, _words) in WRONG.items():
        grid = init_device_mesh("cpu", (4,)) if sizes is None else mesh(**sizes)
        found[name] = attempt(make(), grid, **options)
    found["taken"] = attempt(tied(2, 3), mesh(dp=2, ep=2))[:2]
    model = two(d_hidden=6)
    attempt(model, mesh(ep=2, tp=2), tp="width")
    found["then_taken"] = attempt(model, mesh(ep=2, tp=2), tp="slice")[:2]
    return found


@pytest.fixture(scope="module")
def wrong():
    return run(4, attempt_wrong)


@pytest.mark.parametrize("name", WRONG)
def test_what_cannot_be_is_said_on_every_process(wrong, name):
    assert_refused([found[name] for found in wrong], *WRONG[name][-1])


@pytest.mark.parametrize("name", ["taken", "then_taken"])
def test_what_can_be_is_taken(wrong, name):
    assert [found[name] for found in wrong] == [("nothing", "")] * 4
