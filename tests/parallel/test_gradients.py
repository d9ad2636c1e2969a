"""The norm of all gradients: every parameter once, wherever it is."""

import itertools
import math

import pytest
import torch
import torch.distributed as dist
from layout_cases import Case, batch, build, expert_in, spread
from processes import needs_gloo, run
from torch import nn

import fastmoe

ALONE = Case(())
NORMS = [1, 2, 3.5, math.inf]


def backward(model, case=ALONE, rank=0):
    own = case.sequences(rank)
    x, upstream, mask, ids = (whole[own.start : own.stop] for whole in batch(1, sum(case.shares)))
    loss = (model(x, token_mask=mask, token_ids=ids) * upstream).sum()
    (loss * len(case.shares)).backward()
    return model


@pytest.mark.parametrize("norm_type", NORMS)
@pytest.mark.parametrize("max_norm", [0.0, 0.5, 1e6, math.inf])
def test_a_plain_model_is_clipped_as_by_torch(norm_type, max_norm):
    models = [backward(build(*ALONE.alone)) for _ in range(2)]
    norm = fastmoe.clip_grad_norm_(models[0], max_norm, norm_type)
    expected = nn.utils.clip_grad_norm_(models[1].parameters(), max_norm, norm_type)
    assert torch.equal(norm, expected)
    for one, other in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert torch.equal(one.grad, other.grad)


BAD = [(-1.0, 2.0), (math.nan, 2.0), ("1", 2.0), (True, 2.0), (1.0, 0.0), (1.0, -2.0), (1.0, math.nan), (1.0, "2")]


@pytest.mark.parametrize("arguments", BAD)
def test_bad_arguments(arguments):
    model = backward(build(*ALONE.alone))
    before = [p.grad.clone() for p in model.parameters()]
    with pytest.raises(ValueError, match="norm"):
        fastmoe.clip_grad_norm_(model, *arguments)
    assert all(torch.equal(p.grad, grad) for p, grad in zip(model.parameters(), before, strict=True))


def test_a_model_that_is_not_parallel_has_nothing_to_synchronise():
    with pytest.raises(ValueError, match="not parallel"), fastmoe.no_sync(build(*ALONE.alone)):
        pass


def two_micro_steps(engine):
    """A dense gradient after the first, which is not synchronised, and after the second, which is."""
    case = Case((("ep", 2),), shares=(4, 3), engine=engine)
    model, seen = spread(case), []
    with fastmoe.no_sync(model):
        seen.append(backward(model, case, dist.get_rank()).last.weight.grad)
    seen = [None if grad is None else grad.clone() for grad in seen]
    grad = backward(model, case, dist.get_rank()).last.weight.grad
    return *seen, grad.full_tensor() if hasattr(grad, "full_tensor") else grad


@needs_gloo
@pytest.mark.parametrize("engine", ["ddp", "fsdp"])
def test_no_sync_synchronises_nothing(engine):
    (first, both), (first_elsewhere, both_elsewhere) = run(2, two_micro_steps, engine)
    if engine == "ddp":
        assert not torch.allclose(first, first_elsewhere)
    else:
        assert first is None
        assert first_elsewhere is None
    torch.testing.assert_close(both, both_elsewhere)


PARTS = {
    "dense": lambda name: not expert_in(name),
    "experts": lambda name: bool(expert_in(name)),
    "b2": lambda name: "b2" in expert_in(name),
    "everything": lambda name: True,
}
LAYOUTS = [
    Case((("dp", 2), ("ep", 2)), kind="prelu", shares=(3, 2, 0, 2)),
    Case((("dp", 2), ("ep", 2)), kind="gated", shares=(3, 2, 0, 2), engine="fsdp"),
    Case((("ep", 4),), kind="mixed", shares=(3, 2, 0, 2), engine="fsdp"),
    Case((("dp", 2), ("tp", 2)), kind="gated", shares=(3, 4)),
    Case((("ep", 2), ("tp", 2)), kind="stacked", shares=(3, 4)),
    Case((("ep", 2), ("tp", 2)), kind="modules", shares=(3, 4), tp="slice"),
]


def norms_of(model):
    """Of parts of the gradients, which leaves none of them."""
    grads = {name: p.grad for name, p in model.named_parameters()}
    found = {}
    for part, chosen in PARTS.items():
        for name, parameter in model.named_parameters():
            parameter.grad = grads[name] if chosen(name) else None
        for norm_type in NORMS:
            found[part, norm_type] = fastmoe.clip_grad_norm_(model, math.inf, norm_type)
    return found


def norms_of_all(cases):
    return [norms_of(backward(spread(case), case, dist.get_rank())) for case in cases]


@pytest.fixture(scope="module")
def norms():
    return list(zip(*run(4, norms_of_all, LAYOUTS), strict=True))


@needs_gloo
@pytest.mark.parametrize("number", range(len(LAYOUTS)), ids=[str(case) for case in LAYOUTS])
def test_each_parameter_counts_once(norms, number):
    expected = norms_of(backward(build(*LAYOUTS[number].alone)))
    for found in norms[number]:
        for what, norm in found.items():
            torch.testing.assert_close(
                norm.double(), expected[what].double(), rtol=1e-10, atol=1e-10, msg=lambda m, w=what: f"{w}: {m}"
            )
        assert found["everything", 2] > found["dense", 2] > 0


NOT_FINITE = [math.nan, math.inf, -math.inf]


def norms_with_one(case, places):
    """Norms where a gradient of the second process alone has a number that is not finite."""
    found = {}
    for place, value, norm_type in itertools.product(places, NOT_FINITE, NORMS):
        model = backward(spread(case), case, dist.get_rank())
        if dist.get_rank() == 1:
            grad = next(p.grad for name, p in model.named_parameters() if PARTS[place](name))
            (grad.to_local() if hasattr(grad, "to_local") else grad).view(-1)[0] = value
        found[place, value, norm_type] = fastmoe.clip_grad_norm_(model, 1.0, norm_type).item()
    return found


@needs_gloo
@pytest.mark.parametrize(("engine", "places"), [("ddp", ["experts"]), ("fsdp", ["experts", "dense"])])
def test_what_is_not_finite_on_one_process_is_known_to_all(engine, places):
    case = Case((("ep", 2),), shares=(4, 3), engine=engine)
    for found in run(2, norms_with_one, case, places):
        assert len(found) == len(places) * len(NOT_FINITE) * len(NORMS)
        assert not any(map(math.isfinite, found.values())), found
