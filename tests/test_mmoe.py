"""`fastmoe.MMoE`: against slow loops, with gradients; PLE; experts and towers of one's own; statistics; bad input."""

import copy
import pickle

import pytest
import torch
from helpers import gradients
from torch import nn

import fastmoe

ACT = {"relu": torch.relu, "silu": nn.functional.silu, "sin": torch.sin}


class Counted(nn.Module):
    """An expert that counts its calls, and works in place on what it was given."""

    def __init__(self, d_out=5):
        super().__init__()
        self.linear, self.calls = nn.Linear(5, d_out), 0

    def forward(self, x_TD):
        self.calls += 1
        return self.linear(x_TD.relu_())


KINDS = {
    "mmoe": {"d_hidden": 4, "d_out": 3},
    "gated": {"d_hidden": 4, "d_out": 3, "activation": "swiglu", "bias": False},
    "callable": {"d_hidden": 4, "activation": torch.sin},
    "prelu": {"d_hidden": 4, "activation": nn.PReLU},
    "stacked": {"d_hidden": 4, "d_out": 3, "num_levels": 2},
    "cgc": {"d_hidden": 4, "d_out": 3, "num_task_experts": 1},
    "ple": {"d_hidden": 4, "d_out": 3, "num_task_experts": 2, "num_levels": 2},
    "ple3": {"d_hidden": 4, "d_out": 3, "num_task_experts": 1, "num_levels": 3, "bias": False},
    "own": {"expert": lambda: Counted(3)},
    "own_ple": {"expert": Counted, "num_task_experts": 2, "num_levels": 2},
    "list": {"expert": "list"},
    "towers": {"d_hidden": 4, "d_out": 3, "tower": lambda: nn.Sequential(nn.ReLU(inplace=True), nn.Linear(3, 2))},
    "one": {"d_hidden": 4, "d_out": 3, "num_experts": 1, "num_tasks": 1},
}


def build(kind, **changes):
    options = {"num_experts": 4, "num_tasks": 3} | KINDS[kind] | changes
    if options.get("activation") is nn.PReLU:
        options["activation"] = nn.PReLU(4)
    if options.get("expert") == "list":
        options["expert"] = [
            nn.Linear(5, 3),
            nn.Sequential(nn.Linear(5, 9), nn.Tanh(), nn.Linear(9, 3)),
            *[Counted(3)] * 2,
        ]
    return fastmoe.MMoE(5, **options).double()


def expert_outputs(experts, x):
    """What each expert of a group makes of one token, expert by expert."""
    if hasattr(experts, "modules_list"):
        return [module(x.clone().unsqueeze(0))[0] for module in experts.modules_list]
    outputs = []
    for e in range(len(experts.w1)):
        pre = experts.w1[e] @ x + (0 if experts.b1 is None else experts.b1[e])
        if experts.activation == "swiglu":
            hidden = nn.functional.silu(pre[:4]) * pre[4:]
        elif experts.activation == "relu":
            hidden = pre.clamp(min=0)
        else:
            hidden = experts.activation(pre.unsqueeze(0))[0]
        outputs.append(experts.w2[e] @ hidden + (0 if experts.b2 is None else experts.b2[e]))
    return outputs


def mixture(gate, x, outputs):
    exps = [torch.exp(row @ x) for row in gate.weight]
    assert len(exps) == len(outputs)
    return sum(w * out for w, out in zip(exps, outputs, strict=True)) / sum(exps), [w / sum(exps) for w in exps]


def token_loop(layer, x_TD):
    """Each task's outputs and its gate weights by level, one token at a time."""
    outputs, weights = [[] for _ in range(layer.num_tasks)], []
    for x in x_TD:
        shared, tasks, by_level = x, [x] * layer.num_tasks, []
        for level in layer.levels:
            common = expert_outputs(level.shared, shared)
            own = [expert_outputs(level.own[k], tasks[k]) if len(level.own) else [] for k in range(layer.num_tasks)]
            mixed = [mixture(level.gates[k], tasks[k], common + own[k]) for k in range(layer.num_tasks)]
            if level.shared_gate is not None:
                shared, _ = mixture(level.shared_gate, shared, common + [out for outs in own for out in outs])
            tasks, gates = [m for m, _ in mixed], [w for _, w in mixed]
            by_level.append(gates)
        weights.append(by_level)
        for k in range(layer.num_tasks):
            outputs[k].append(layer.towers[k](tasks[k].clone()) if len(layer.towers) else tasks[k])
    return [torch.stack(out) for out in outputs], weights


def run(forward, layer, x, upstreams):
    layer.zero_grad()
    leaf = x.detach().clone().requires_grad_()
    ys = forward(leaf)
    torch.autograd.backward(ys, [u[..., : y.shape[-1]] for u, y in zip(upstreams, ys, strict=False)])
    return {**{f"y{k}": y.detach() for k, y in enumerate(ys)}, "x": leaf.grad, **gradients(layer)}


@pytest.mark.parametrize("kind", KINDS)
def test_the_formula(kind):
    layer = build(kind)
    x, upstreams = torch.randn(7, 5).double(), torch.randn(3, 7, 5).double()
    before = x.clone()
    got = run(layer, layer, x, upstreams)
    expected = run(lambda leaf: token_loop(layer, leaf)[0], layer, x, upstreams)
    assert torch.equal(x, before)
    assert got.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(got[name], expected[name], msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("kind", KINDS)
def test_utilization(kind):
    layer = build(kind)
    assert fastmoe.stats(layer) == {}
    x = torch.randn(7, 5).double()
    layer(x)
    stats = fastmoe.stats(layer)[""]
    assert isinstance(stats, fastmoe.TaskStats)
    assert not any(mean.requires_grad for mean in stats.mean_weights)
    shared, own = layer.num_experts, layer.num_task_experts
    expected = torch.zeros(layer.num_levels, layer.num_tasks, shared + layer.num_tasks * own)
    for by_level in token_loop(layer, x)[1]:
        for level, gates in enumerate(by_level):
            for k, weights in enumerate(gates):
                for i, weight in enumerate(weights):
                    column = i if i < shared else i + k * own
                    expected[level, k, column] += weight.item() / len(x)
    torch.testing.assert_close(stats.utilization, expected)
    torch.testing.assert_close(stats.utilization.sum(2), torch.ones(layer.num_levels, layer.num_tasks))
    assert str(stats).count("task") == layer.num_levels * layer.num_tasks


def test_stats_of_a_whole_model():
    model = nn.ModuleDict({"a": fastmoe.MoE(5, 4), "b": fastmoe.MMoE(5, 4, 2)})
    for layer in model.values():
        layer(torch.randn(3, 5))
    found = fastmoe.stats(model)
    assert {name: type(stats) for name, stats in found.items()} == {"a": fastmoe.LayerStats, "b": fastmoe.TaskStats}
    assert list(fastmoe.moe_layers(model)) == ["a"]


def test_names_and_shapes():
    shapes = {n: tuple(p.shape) for n, p in build("ple").named_parameters()}
    for level, width in ((0, 5), (1, 3)):
        assert shapes[f"levels.{level}.shared.w1"] == (4, 4, width)
        assert shapes[f"levels.{level}.own.2.w2"] == (2, 3, 4)
        assert shapes[f"levels.{level}.gates.2.weight"] == (6, width)
    assert shapes["levels.0.shared_gate.weight"] == (10, 5)
    assert "levels.1.shared_gate.weight" not in shapes
    assert tuple(fastmoe.MMoE(5, 2, 2).levels[0].shared.w1.shape) == (2, 20, 5)


@pytest.mark.parametrize("kind", ["own", "own_ple"])
def test_an_expert_is_called_once(kind):
    layer = build(kind)
    layer(torch.randn(6, 5).double())
    calls = [module.calls for module in layer.modules() if isinstance(module, Counted)]
    assert len(calls) == (4 if kind == "own" else 2 * (4 + 3 * 2))
    assert set(calls) == {1}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("leading", [(), (12,), (2, 1, 3)])
def test_leading_dimensions_are_free(kind, leading):
    layer = build(kind)
    x = torch.randn(*leading, 5).double()
    flat = layer(x.reshape(-1, 5))
    for y, y_TO in zip(layer(x), flat, strict=True):
        assert y.shape == (*leading, y_TO.shape[1])
        torch.testing.assert_close(y.reshape(y_TO.shape), y_TO)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(0, 5), (2, 0, 5)])
def test_no_token(kind, shape):
    layer = build(kind)
    got = run(layer, layer, torch.randn(shape).double(), torch.zeros(3, *shape).double())
    assert got["y0"].shape[:-1] == got["x"].shape[:-1] == shape[:-1]
    assert all((grad == 0).all() for grad in got.values())
    assert (fastmoe.stats(layer)[""].utilization == 0).all()


@pytest.mark.parametrize("kind", ["mmoe", "gated", "ple", "own", "towers"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_dtypes(kind, dtype):
    layer = build(kind).to(dtype)
    got = run(layer, layer, torch.randn(8, 5).to(dtype), torch.randn(3, 8, 5).to(dtype))
    assert {t.dtype for t in got.values()} == {dtype}
    assert all(t.isfinite().all() for t in got.values())


@pytest.mark.parametrize("kind", ["mmoe", "gated", "ple", "own", "towers"])
def test_autocast(kind):
    layer = build(kind).float()
    x = torch.randn(32, 5)
    full = layer(x)
    with torch.autocast("cpu", torch.bfloat16):
        half = layer(x)
    for y, exact in zip(half, full, strict=True):
        assert y.dtype == torch.bfloat16
        assert (y - exact).norm() <= 0.03 * exact.norm()
    sum(y.float().sum() for y in half).backward()
    assert {grad.dtype for grad in gradients(layer).values()} == {torch.float32}


@pytest.mark.parametrize("kind", ["mmoe", "ple", "own", "towers"])
def test_copies_and_reset(kind):
    layer = build(kind)
    x = torch.randn(4, 5).double()
    for other in (copy.deepcopy(layer), *([pickle.loads(pickle.dumps(layer))] if kind != "own" else [])):
        assert other.last_stats is None
        for y, expected in zip(other(x), layer(x), strict=True):
            assert torch.equal(y, expected)
    for param in layer.parameters():
        param.data.fill_(torch.nan)
    layer.reset_parameters()
    assert all(param.isfinite().all() and param.abs().max() > 0 for param in layer.parameters())


def test_device_and_dtype():
    layer = fastmoe.MMoE(5, 4, 2, tower=lambda: nn.Linear(5, 1), num_levels=2, device="meta", dtype=torch.bfloat16)
    assert {(p.device.type, p.dtype) for p in layer.parameters()} == {("meta", torch.bfloat16)}
    assert [y.shape for y in layer(torch.empty(3, 5, device="meta", dtype=torch.bfloat16))] == [(3, 1)] * 2


def test_towers_in_a_list_and_as_one_module():
    x = torch.randn(3, 5)
    ys = fastmoe.MMoE(5, 4, 2, tower=[nn.Linear(5, 1), nn.Identity])(x)
    assert [y.shape for y in ys] == [(3, 1), (3, 5)]
    towers = fastmoe.MMoE(5, 4, 2, tower=nn.Linear(5, 1)).towers
    assert not torch.equal(towers[0].weight, towers[1].weight)


def test_tasks_that_conflict_are_learnt():
    layer = fastmoe.MMoE(4, 4, 2, d_hidden=16, d_out=1)
    x = torch.randn(256, 4)
    targets = [x[:, :1].abs(), -x[:, :1].abs()]
    optimizer = torch.optim.Adam(layer.parameters(), 0.02)
    losses = []
    for _ in range(150):
        loss = sum(nn.functional.mse_loss(y, t) for y, t in zip(layer(x), targets, strict=True))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.1 * losses[0]


def linears(number):
    return [nn.Linear(5, 5) for _ in range(number)]


CONSTRUCTION = [
    ({"d_in": 0}, "d_in must be a whole number >= 1, got 0"),
    ({"num_experts": 0}, "num_experts must be a whole number >= 1, got 0"),
    ({"num_tasks": 0}, "num_tasks must be a whole number >= 1, got 0"),
    ({"num_task_experts": -1}, "num_task_experts must be a whole number >= 0, got -1"),
    ({"num_levels": 0}, "num_levels must be a whole number >= 1, got 0"),
    ({"d_hidden": 0}, "d_hidden must be a whole number >= 1, got 0"),
    ({"d_out": 2.5}, "d_out must be a whole number >= 1, got 2.5"),
    ({"activation": "rellu"}, "unknown activation 'rellu'. Did you mean 'relu'"),
    ({"dtype": torch.int32}, "dtype must be a floating type, got torch.int32"),
    ({"expert": nn.Linear(5, 5), "d_out": 5}, "d_hidden, d_out, activation and bias are for built-in experts"),
    ({"expert": nn.Linear(5, 5), "bias": False}, "d_hidden, d_out, activation and bias are for built-in experts"),
    ({"expert": linears(2)}, "expert must list one module for each of 4 experts, got 2"),
    ({"expert": linears(4), "num_levels": 2}, "a list of experts stands for the shared experts of one level"),
    ({"expert": nn.ModuleList(linears(4)), "num_task_experts": 1}, "a list of experts stands for"),
    ({"expert": lambda: 3}, "each expert must be an nn.Module, or a callable that returns one; got 3"),
    ({"tower": linears(3)}, "tower must list one module for each of 2 tasks, got 3"),
    ({"tower": 3}, "each tower must be an nn.Module, or a callable that returns one; got 3"),
]


@pytest.mark.parametrize(("changes", "message"), CONSTRUCTION)
def test_bad_construction(changes, message):
    with pytest.raises(ValueError, match=message):
        fastmoe.MMoE(**({"d_in": 5, "num_experts": 4, "num_tasks": 2} | changes))


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.randn(3, 6), r"x must be \(..., 5\), got \(3, 6\)"),
        (torch.tensor(1.0), r"x must be \(..., 5\), got \(\)"),
        (torch.ones(3, 5, dtype=torch.int64), "x must be floating, got torch.int64"),
    ],
)
def test_bad_calls(x, message):
    with pytest.raises(ValueError, match=message):
        fastmoe.MMoE(5, 4, 2)(x)


@pytest.mark.parametrize(
    ("experts", "message"),
    [
        ([nn.Linear(5, 3), nn.Linear(5, 4)], "expert 1 returned 4, those before it 3"),
        ([nn.Flatten(0), nn.Linear(5, 4)], r"expert 0 was given \(3, 5\) and must return \(3, d_out\), got \(15,\)"),
    ],
)
def test_experts_whose_outputs_do_not_fit(experts, message):
    with pytest.raises(ValueError, match=message):
        fastmoe.MMoE(5, 2, 2, expert=experts)(torch.randn(3, 5))
