"""Along tp processes hold the same tokens: they share the hidden width of experts, or each routes a slice."""

import itertools

import pytest
import torch
from layout_cases import Case, assert_as_one, mesh_of
from processes import needs_gloo, run

from fastmoe.experts import MLPExperts
from fastmoe.parallel import Layout
from fastmoe.parallel.hidden import gather_hidden, split_hidden, take_hidden
from fastmoe.parallel.layout import processes_of

pytestmark = needs_gloo

MESHES = {
    (("tp", 2),): (7,),
    (("ep", 2), ("tp", 2)): (5, 2),
    (("dp", 2), ("tp", 2)): (7, 0),
}


def cases(tp, routers, kinds):
    for i, (mesh, shares) in enumerate(MESHES.items()):
        for (j, router), (k, kind) in itertools.product(enumerate(routers), enumerate(kinds)):
            options = {"chunks": 2, "suppress_duplicates": True} if (i + k) % 2 and ("ep", 2) in mesh else {}
            case = Case(mesh, router, kind, shares=shares, tp=tp, **options)
            few = (i + j + k) % len(kinds) == 0 or (len(mesh) == 1 and router == "topk")
            yield pytest.param(case, id=str(case), marks=[] if few else [pytest.mark.slow])


HIDDEN = list(cases("hidden", ["topk", "switch", "hash", "soft"], ["stacked", "gated", "no_bias", "gated_no_bias"]))
ROUTERS = ["topk", "switch", "noisy_topk", "expert_choice", "soft", "loss_free", "hash", "choosy"]
SLICE = list(cases("slice", ROUTERS, ["stacked", "gated", "modules", "mixed", "prelu"]))


@pytest.mark.parametrize("case", HIDDEN + SLICE)
def test_training_is_that_of_one_process(trained, case):
    assert_as_one(case, trained(case))


def round_trip(activation):
    torch.manual_seed(0)
    experts = MLPExperts(3, 6, 8, activation=activation)
    whole = {name: p.detach().clone() for name, p in experts.named_parameters()}
    split_hidden(experts, processes_of(Layout(mesh_of((("tp", 2),))).same_tokens))
    parts = {name: p.detach().clone() for name, p in experts.named_parameters()}
    taken = {name: take_hidden(experts, name, w) for name, w in whole.items()}
    return whole, parts, taken, {name: gather_hidden(experts, name, part) for name, part in parts.items()}


@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
def test_parts_make_the_whole(activation):
    for whole, parts, taken, gathered in run(2, round_trip, activation):
        torch.testing.assert_close(gathered, whole, rtol=0, atol=0)
        torch.testing.assert_close(taken, parts, rtol=0, atol=0)
        assert all(parts[name].numel() * 2 == whole[name].numel() for name in ("w1", "b1", "w2"))
        assert torch.equal(parts["b2"], whole["b2"])
