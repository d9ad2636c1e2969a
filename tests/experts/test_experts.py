"""Stacked experts and experts of one's own, called directly."""

import pytest
import torch
from helpers import gradients
from torch import nn

import fastmoe
from fastmoe.experts import MLPExperts, ModuleExperts, SharedExpert, build_experts

OFFSETS = torch.tensor([2, 2, 5], dtype=torch.int32)  # expert 1 has no row; the last two rows of seven are dropped


@pytest.mark.parametrize("activation", ["relu", "silu", "gelu", "gelu_tanh"])
@pytest.mark.parametrize("bias", [True, False])
def test_stacked_experts_are_linear_layers(activation, bias):
    experts = MLPExperts(3, 4, 5, activation=activation, bias=bias).double()
    module = {"relu": nn.ReLU(), "silu": nn.SiLU(), "gelu": nn.GELU(), "gelu_tanh": nn.GELU("tanh")}[activation]
    rows = torch.randn(7, 4, dtype=torch.float64)
    out = experts.compute(rows, OFFSETS)
    for e, (start, end) in enumerate([(0, 2), (2, 2), (2, 5)]):
        first, second = nn.Linear(4, 5, bias).double(), nn.Linear(5, 4, bias).double()
        for linear, name in ((first, "1"), (second, "2")):
            linear.weight.data = getattr(experts, "w" + name)[e].data
            if bias:
                linear.bias.data = getattr(experts, "b" + name)[e].data
        torch.testing.assert_close(out[start:end], second(module(first(rows[start:end]))))
    assert torch.equal(out[5:], torch.zeros(2, 4, dtype=torch.float64))


@pytest.mark.parametrize("gated", [False, True])
def test_initialisation_is_that_of_linear_layers(gated):
    experts = MLPExperts(4, 100, 400, activation="swiglu" if gated else "gelu")
    for name, fan_in in (("w1", 100), ("b1", 100), ("w2", 400), ("b2", 400)):
        values, bound = getattr(experts, name).detach(), fan_in**-0.5
        assert bound * 0.95 < values.abs().max() <= bound
        per_expert_std = values.flatten(1).std(1) / (bound / 3**0.5)  # of a uniform distribution
        assert ((per_expert_std - 1).abs() < (0.02 if values.dim() == 3 else 0.2)).all()
        assert not torch.equal(values[0], values[1])


def make_modules():
    return [nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 9), nn.ReLU(), nn.Linear(9, 4)), nn.Identity()]


def test_module_experts():
    experts = ModuleExperts(make_modules()).double()
    rows = torch.randn(7, 4, dtype=torch.float64, requires_grad=True)
    out = experts.compute(rows, OFFSETS)
    linear, _, identity = experts.modules_list
    expected = torch.cat([linear(rows[:2]), identity(rows[2:5]), torch.zeros(2, 4, dtype=torch.float64)])
    torch.testing.assert_close(out, expected)
    upstream = torch.randn_like(out)
    leaves = [rows, linear.weight, linear.bias]
    by_hand = torch.autograd.grad(expected, leaves, upstream)
    out.backward(upstream)
    for leaf, grad in zip(leaves, by_hand, strict=True):
        torch.testing.assert_close(leaf.grad, grad)
    assert all((p.grad == 0).all() for p in experts.modules_list[1].parameters())


def test_no_row_at_all():
    experts = ModuleExperts([nn.Linear(4, 6), nn.Linear(4, 6)])
    out = experts.compute(torch.randn(3, 4), torch.zeros(2, dtype=torch.int32))
    assert torch.equal(out, torch.zeros(3, 6))
    out.sum().backward()
    assert all((grad == 0).all() for grad in gradients(experts).values())


def test_a_frozen_idle_expert():
    experts = ModuleExperts(make_modules())
    experts.modules_list[1].requires_grad_(False)
    experts.compute(torch.randn(7, 4), OFFSETS).sum().backward()
    assert all(p.grad is None for p in experts.modules_list[1].parameters())
    assert all(p.grad is not None for p in experts.modules_list[0].parameters())


class Wrong(nn.Module):
    def __init__(self, answer):
        super().__init__()
        self.answer = answer

    def forward(self, rows):
        return self.answer(rows)


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (lambda rows: rows[:1], r"expert 2 was given \(3, 4\) and must return \(3, d_out\), got \(1, 4\)"),
        (lambda rows: rows.sum(1), r"expert 2 was given \(3, 4\) and must return \(3, d_out\), got \(3,\)"),
        (lambda rows: (rows, None), r"must return \(3, d_out\), got tuple"),
        (lambda rows: rows[:, :3], "must return the same width: expert 2 returned 3, one before it 4"),
    ],
)
def test_an_expert_that_answers_wrongly(answer, message):
    experts = ModuleExperts([nn.Linear(4, 4), nn.Linear(4, 4), Wrong(answer)])
    with pytest.raises(ValueError, match=message):
        experts.compute(torch.randn(7, 4), OFFSETS)


def test_what_expert_may_be():
    one = nn.Linear(4, 4)
    copies = build_experts(one, 3)
    assert all(not torch.equal(copy.weight, one.weight) for copy in copies), "copies are initialised anew"
    assert not torch.equal(copies[0].weight, copies[1].weight)
    made = build_experts(lambda: nn.Linear(4, 4), 3)
    assert len({id(module) for module in made}) == 3
    given = make_modules()
    mixed = build_experts([given[0], nn.Identity, given[1]], 3)
    assert mixed[0] is given[0]
    assert mixed[2] is given[1]
    assert isinstance(mixed[1], nn.Identity)
    assert isinstance(build_experts(nn.Identity, 1)[0], nn.Identity)


@pytest.mark.parametrize(
    ("expert", "message"),
    [
        (make_modules()[:2], "expert must list one module for each of 3 experts, got 2"),
        (3, "must be an nn.Module, or a callable that returns one; got 3"),
        ("mlp", "must be an nn.Module, or a callable that returns one; got 'mlp'"),
        (lambda: 5, "got 5"),
        ([nn.Identity(), nn.Identity(), None], "got None"),
    ],
)
def test_what_expert_may_not_be(expert, message):
    with pytest.raises(ValueError, match=message):
        fastmoe.MoE(4, 3, expert=expert)


@pytest.mark.parametrize("activation", ["gelu", "swiglu", torch.tanh])
def test_the_shared_expert_is_a_stacked_one(activation):
    shared = SharedExpert(4, 5, activation=activation).double()
    stacked = MLPExperts(1, 4, 5, activation=activation).double()
    pairs = {"w1": shared.w1.weight, "b1": shared.w1.bias, "w2": shared.w2.weight, "b2": shared.w2.bias}
    stacked.load_state_dict({name: value.unsqueeze(0) for name, value in pairs.items()})
    x = torch.randn(6, 4, dtype=torch.float64)
    torch.testing.assert_close(shared(x), stacked.compute(x, torch.tensor([6], dtype=torch.int32)))


def test_dropout_is_on_the_hidden_activations():
    experts = MLPExperts(2, 3, 1000, dropout=0.25, bias=False, activation="relu")
    experts.w1.data.fill_(1.0)
    experts.w2.data.fill_(1.0)
    rows, offsets = torch.full((2, 3), 1 / 3), torch.tensor([1, 2], dtype=torch.int32)
    kept = experts.compute(rows, offsets) * 0.75 / 1000  # the share of 1000 hidden units that was kept, per row
    assert ((kept - 0.75).abs() < 0.1).all()
    assert kept[0, 0] != kept[1, 0]
    torch.testing.assert_close(experts.eval().compute(rows, offsets), torch.full((2, 3), 1000.0))


@pytest.mark.parametrize("dropout", [-0.1, 1.5, "0.1", True, float("nan")])
def test_bad_dropout(dropout):
    with pytest.raises(ValueError, match="dropout must be a number from 0 to 1"):
        fastmoe.MoE(4, 2, dropout=dropout)


def test_experts_may_work_in_place():
    torch.manual_seed(0)
    expert = [torch.nn.Sequential(torch.nn.ReLU(inplace=True), torch.nn.Linear(6, 6)) for _ in range(3)]
    out_of_place = [torch.nn.Sequential(torch.nn.ReLU(), e[1]) for e in expert]
    x, router = torch.randn(9, 6), fastmoe.routers.TopKRouter(6, 3, 2)
    grads = []
    for experts in (expert, out_of_place):
        x_leaf = x.clone().requires_grad_()
        y = fastmoe.MoE(6, 3, expert=experts, router=router)(x_leaf)
        grads.append([y, *torch.autograd.grad(y.square().sum(), [x_leaf, expert[0][1].weight])])
    torch.testing.assert_close(*grads)


def test_a_module_list_is_a_list():
    layer = fastmoe.MoE(4, 2, expert=torch.nn.ModuleList([torch.nn.Identity(), torch.nn.Linear(4, 4)]))
    assert [type(e).__name__ for e in layer.experts.modules_list] == ["Identity", "Linear"]


def test_options_of_built_in_experts_are_refused():
    for options in ({"activation": "relu"}, {"bias": False}):
        with pytest.raises(ValueError, match="activation and bias are for built-in experts"):
            fastmoe.MoE(4, 2, expert=torch.nn.Identity, **options)
    fastmoe.MoE(4, 2, expert=torch.nn.Identity, shared_d_hidden=8, activation="relu")


def test_autocast_gives_its_dtype_whichever_expert_ran():
    layer = fastmoe.MoE(4, 2, 1, expert=[torch.nn.Identity(), torch.nn.Linear(4, 4)])
    with torch.autocast("cpu", torch.bfloat16):
        assert {layer(torch.randn(1, 4)).dtype for _ in range(20)} == {torch.bfloat16}
