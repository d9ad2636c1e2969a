"""`fastmoe.MoE`: the contract of names and shapes, metamorphic tests, masks, dtypes, and bad input."""

import copy
import dataclasses
import pickle

import pytest
import torch
from helpers import gradients
from torch import nn
from torch.func import functional_call

import fastmoe


class Conv(nn.Module):
    """A convolution over features."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv1d(1, 1, 3, padding=1)

    def forward(self, rows_RD):
        return self.conv(rows_RD.unsqueeze(1)).squeeze(1)


class Compact(fastmoe.Router):
    """A router that knows no token mask: the layer gives it the True tokens alone."""

    def forward(self, x_TD):
        probs_TE = self.proj(x_TD).softmax(1)
        weights_TK, ids_TK = probs_TE.topk(self.top_k)
        losses = {"mine": fastmoe.routers.load_balance_loss(probs_TE, ids_TK)}
        return fastmoe.Routing.from_topk(ids_TK, weights_TK, self.num_experts, losses, probs_TE)


def mixed():
    wide = nn.Sequential(nn.Linear(6, 11), nn.Tanh(), nn.Linear(11, 6))
    return [nn.Identity(), nn.Linear(6, 6), Conv(), wide]


KINDS = {
    "stacked": {"d_hidden": 5},
    "gated": {"d_hidden": 5, "activation": "swiglu", "bias": False},
    "callable": {"d_hidden": 5, "activation": torch.sin},
    "prelu": {"d_hidden": 5, "activation": nn.PReLU},
    "modules": {"expert": lambda: nn.Linear(6, 6)},
    "mixed": {"expert": mixed},
    "shared": {"d_hidden": 5, "shared_d_hidden": 7},
    "shared_modules": {"expert": Conv, "shared_d_hidden": 3},
    "one": {"d_hidden": 5, "top_k": 1},
    "reference": {"d_hidden": 5, "backend": "reference"},
    "own_router": {"d_hidden": 5, "router": Compact},
    "no_normalize": {"d_hidden": 5, "router_options": {"normalize": False, "z_loss_weight": 0.1}},
}


def build(kind, **changes):
    options = dict(KINDS[kind]) | changes
    if options.get("activation") is nn.PReLU:
        options["activation"] = nn.PReLU()
    if options.get("expert") is mixed:
        options["expert"] = mixed()
    return fastmoe.MoE(6, 4, **options).double()


def run(layer, x, upstream, *mask):
    """Output, gradient of x, and every parameter's gradient, by name."""
    layer.zero_grad()
    leaf = x.detach().clone().requires_grad_()
    y = layer(leaf, *mask)
    y.backward(upstream)
    return {"y": y.detach(), "x": leaf.grad, **gradients(layer)}


def assert_close(got, expected, **options):
    assert got.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(got[name], expected[name], msg=lambda m, n=name: f"{n}: {m}", **options)


def token_loop(layer, x_TD):
    """`y = sum over the chosen experts of weight * expert(x)`, one token and one expert at a time."""
    routing = layer.router(x_TD)
    rows = zip(routing.token_ids_N.tolist(), routing.expert_ids_N.tolist(), routing.weights_N, strict=True)
    y = [torch.zeros(6, dtype=x_TD.dtype) for _ in x_TD]
    for t, e, weight in rows:
        if isinstance(layer.experts, fastmoe.experts.ModuleExperts):
            out = layer.experts.modules_list[e](x_TD[t : t + 1])[0]
        else:
            w1, b1, w2, b2 = (getattr(layer.experts, n) for n in ("w1", "b1", "w2", "b2"))
            pre = w1[e] @ x_TD[t] + (0 if b1 is None else b1[e])
            act = layer.experts.activation
            if act == "swiglu":
                hidden = nn.functional.silu(pre[:5]) * pre[5:]
            else:
                hidden = nn.functional.gelu(pre) if act == "gelu" else act(pre)
            out = w2[e] @ hidden + (0 if b2 is None else b2[e])
        y[t] = y[t] + weight * out
    if layer.shared is not None:
        y = [total + layer.shared(token) for total, token in zip(y, x_TD, strict=True)]
    return torch.stack(y), sum(routing.losses.values())


@pytest.mark.parametrize("kind", KINDS)
def test_the_formula(kind):
    layer = build(kind)
    x, upstream = torch.randn(2, 13, 6, dtype=torch.float64)
    got = run(layer, x, upstream)
    layer.zero_grad()
    leaf = x.clone().requires_grad_()
    y, losses = token_loop(layer, leaf)
    ((y * upstream).sum() + losses).backward()
    for param in layer.parameters():  # an expert without a token
        param.grad = torch.zeros_like(param) if param.grad is None else param.grad
    assert_close(got, {"y": y.detach(), "x": leaf.grad, **gradients(layer)})


def test_names_and_shapes():
    def shapes(**options):
        return {n: tuple(p.shape) for n, p in fastmoe.MoE(6, 4, **options).named_parameters()}

    router = {"router.proj.weight": (4, 6)}
    full = {"experts.w1": (4, 5, 6), "experts.w2": (4, 6, 5), "experts.b1": (4, 5), "experts.b2": (4, 6)}
    assert shapes(d_hidden=5) == router | full
    assert shapes()["experts.w1"] == (4, 24, 6)
    for activation in ("swiglu", "geglu", "reglu"):
        gated = full | {"experts.w1": (4, 10, 6), "experts.b1": (4, 10)}
        assert shapes(d_hidden=5, activation=activation) == router | gated
    assert shapes(d_hidden=5, bias=False) == router | {n: s for n, s in full.items() if "w" in n.split(".")[1]}
    modules = {f"experts.modules_list.{e}.{n}": s for e in range(4) for n, s in (("weight", (7, 6)), ("bias", (7,)))}
    assert shapes(expert=lambda: nn.Linear(6, 7)) == router | modules


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("leading", [(), (12,), (3, 4), (2, 1, 3, 2)])
def test_leading_dimensions_are_free(kind, leading):
    layer = build(kind).eval()
    x = torch.randn(*leading, 6, dtype=torch.float64)
    y = layer(x)
    assert y.shape == x.shape
    torch.testing.assert_close(y.reshape(-1, 6), layer(x.reshape(-1, 6)))
    strided = x.repeat_interleave(2, -1)[..., ::2]
    torch.testing.assert_close(layer(strided), y)


@pytest.mark.parametrize("kind", [k for k in KINDS if k not in ("shared", "shared_modules")])
@pytest.mark.parametrize("shape", [(0, 6), (2, 0, 6)])
def test_no_token(kind, shape):
    layer = build(kind)
    result = run(layer, torch.randn(shape).double(), torch.randn(shape).double())
    assert result["y"].shape == result["x"].shape == shape
    assert all((grad == 0).all() for grad in result.values())
    assert fastmoe.stats(layer)[""].load.sum() == 0


@pytest.mark.parametrize("kind", KINDS)
def test_permuting_tokens_permutes_outputs(kind):
    layer = build(kind)
    x, upstream = torch.randn(2, 13, 6, dtype=torch.float64)
    order = torch.randperm(13)
    straight, permuted = run(layer, x, upstream), run(layer, x[order], upstream[order])
    straight |= {name: straight[name][order] for name in ("x", "y")}
    assert_close(permuted, straight)


@pytest.mark.parametrize("kind", ["stacked", "gated", "mixed", "shared"])
def test_permuting_experts_with_their_router_rows_changes_nothing(kind):
    layer = build(kind)
    permuted, order = copy.deepcopy(layer), torch.randperm(4)
    permuted.router.proj.weight.data = layer.router.proj.weight.data[order]
    if kind == "mixed":
        permuted.experts.modules_list = nn.ModuleList(copy.deepcopy(layer.experts.modules_list[e]) for e in order)
    else:
        for name, param in layer.experts.named_parameters():
            permuted.experts.get_parameter(name).data = param.data[order]
    x, upstream = torch.randn(2, 13, 6, dtype=torch.float64)
    before, after = run(layer, x, upstream), run(permuted, x, upstream)
    for name in ("y", "x"):
        torch.testing.assert_close(after[name], before[name])
    torch.testing.assert_close(after["router.proj.weight"], before["router.proj.weight"][order])
    if kind != "mixed":
        torch.testing.assert_close(after["experts.w1"], before["experts.w1"][order])
    assert torch.equal(fastmoe.stats(permuted)[""].counts, fastmoe.stats(layer)[""].counts[order])


def test_all_experts_chosen_is_the_dense_weighted_sum():
    layer = build("stacked", top_k=4)
    x = torch.randn(9, 6, dtype=torch.float64)
    weights_TE = torch.softmax(x @ layer.router.proj.weight.T, 1)
    experts = layer.experts
    hidden = nn.functional.gelu(torch.einsum("td,ehd->teh", x, experts.w1) + experts.b1)
    out_TED = torch.einsum("teh,edh->ted", hidden, experts.w2) + experts.b2
    torch.testing.assert_close(layer(x), torch.einsum("te,ted->td", weights_TE, out_TED))


@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_identical_experts_with_normalised_weights_are_one_ffn(top_k):
    layer = build("stacked", top_k=top_k, router_options={"normalize": "stop_gradient"})
    for param in layer.experts.parameters():
        param.data = param.data[:1].expand_as(param).clone()
    x = torch.randn(9, 6, dtype=torch.float64)
    w1, b1, w2, b2 = (getattr(layer.experts, name)[0] for name in ("w1", "b1", "w2", "b2"))
    torch.testing.assert_close(layer(x), nn.functional.gelu(x @ w1.T + b1) @ w2.T + b2)


@pytest.mark.parametrize("kind", KINDS)
def test_counts_add_up(kind):
    layer = build(kind)
    layer(torch.randn(13, 6).double())
    assert int(fastmoe.stats(layer)[""].counts.sum()) == 13 * layer.top_k


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("share", [0.6, 0.0, 1.0])
def test_a_masked_token_is_as_if_it_were_not_there(kind, share):
    """NaN in it harms nothing: outputs, losses, statistics and gradients are those of the other tokens alone."""
    layer = build(kind)
    x, upstream = torch.randn(2, 4, 5, 6, dtype=torch.float64)
    mask = torch.rand(4, 5) < share
    expected = run(layer, x[mask], upstream[mask])
    before = fastmoe.stats(layer)[""]
    for rubbish in (torch.nan, torch.inf):
        got = run(layer, torch.where(mask.unsqueeze(-1), x, rubbish), upstream, mask)
        assert (got["y"][~mask] == 0).all()
        assert (got["x"][~mask] == 0).all()
        assert_close(got | {name: got[name][mask] for name in ("x", "y")}, expected)
        after = fastmoe.stats(layer)[""]
        assert torch.equal(after.counts, before.counts)
        assert (after.losses, after.entropy, after.dropped) == (
            pytest.approx(before.losses), pytest.approx(before.entropy), before.dropped)  # fmt: skip


def test_another_output_width():
    layer = fastmoe.MoE(6, 4, expert=[nn.Linear(6, 9) for _ in range(4)]).double()
    x = torch.randn(2, 5, 6, dtype=torch.float64)
    assert layer(x).shape == (2, 5, 9)
    assert layer(x[:, :0]).shape == (2, 0, 9)


@pytest.mark.parametrize("kind", ["stacked", "callable", "modules", "mixed"])
def test_an_expert_without_token_has_zero_gradients(kind):
    layer = build(kind, top_k=1)
    layer.router.proj.weight.data[:] = torch.tensor([0.0, 1.0, 0.0, 0.0]).unsqueeze(1)
    x = torch.rand(5, 6, dtype=torch.float64) + 1
    result = run(layer, x, torch.randn_like(x))
    assert fastmoe.stats(layer)[""].dead == [0, 2, 3]
    for name, grad in result.items():
        if name.startswith("experts.modules_list"):
            assert (grad == 0).all() == (".1." not in name), name
        elif name.startswith("experts"):
            assert (grad[[0, 2, 3]] == 0).all()
            assert (grad[1] != 0).any()


def test_one_module_is_copied_and_initialised_anew():
    layer = fastmoe.MoE(6, 3, expert=nn.Sequential(nn.Linear(6, 6), nn.ReLU()))
    weights = [module[0].weight for module in layer.experts.modules_list]
    assert not any(torch.equal(weights[a], weights[b]) for a, b in ((0, 1), (0, 2), (1, 2)))


@pytest.mark.parametrize("kind", ["stacked", "gated", "callable", "modules", "shared"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_dtypes(kind, dtype):
    layer = build(kind).to(dtype)
    result = run(layer, torch.randn(8, 6).to(dtype), torch.randn(8, 6).to(dtype))
    assert {t.dtype for t in result.values()} == {dtype}
    assert all(t.isfinite().all() for t in result.values())
    made = fastmoe.MoE(6, 4, dtype=dtype, **({} if kind != "shared" else {"shared_d_hidden": 3}))
    assert {p.dtype for p in made.parameters()} == {dtype}


@pytest.mark.parametrize("kind", [k for k in KINDS if k != "reference"])
def test_autocast(kind):
    layer = build(kind).float()
    x, upstream = torch.randn(2, 32, 6)
    full = run(layer, x, upstream)
    with torch.autocast("cpu", torch.bfloat16):
        half = layer(x.requires_grad_())
    assert half.dtype == torch.bfloat16
    layer.zero_grad()
    half.backward(upstream.bfloat16())
    assert x.grad.dtype == torch.float32
    got = {"y": half.detach().float(), "x": x.grad, **gradients(layer)}
    for name, grad in got.items():
        assert grad.dtype == torch.float32
        assert (grad - full[name]).norm() <= 0.03 * full[name].norm(), name
    assert torch.equal(fastmoe.stats(layer)[""].counts, _counts(layer, x)), "the router does not follow autocast"


def _counts(layer, x):
    layer(x)
    return fastmoe.stats(layer)[""].counts


def test_dropout_only_in_training():
    layer = build("stacked", dropout=0.5)
    x = torch.randn(9, 6, dtype=torch.float64)
    assert not torch.equal(layer(x), layer(x))
    run(layer, x, torch.randn_like(x))
    plain = build("stacked")
    plain.load_state_dict(layer.state_dict())
    torch.testing.assert_close(layer.eval()(x), plain.eval()(x))
    dropped_all = build("stacked", dropout=1.0)
    routing = dropped_all.router(x)
    b2 = dropped_all.experts.b2[routing.expert_ids_N] * routing.weights_N.unsqueeze(1)
    torch.testing.assert_close(dropped_all(x), b2.view(9, 2, 6).sum(1))


@pytest.mark.parametrize("kind", KINDS)
def test_copies(kind):
    layer = build(kind)
    x, upstream = torch.randn(2, 7, 6, dtype=torch.float64)
    expected = run(layer, x, upstream)
    fresh = build(kind)
    fresh.load_state_dict(layer.state_dict())
    for other in (fresh, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert_close(run(other, x, upstream), expected)
    called = functional_call(build(kind), dict(layer.named_parameters()), (x,))
    torch.testing.assert_close(called.detach(), expected["y"])


@pytest.mark.parametrize("kind", [k for k in KINDS if k != "mixed"])
def test_meta_device(kind):
    layer = build(kind, device="meta")
    assert {p.device.type for p in layer.parameters()} == {"meta"}
    layer = layer.to_empty(device="cpu")
    for param in layer.parameters():
        param.data.fill_(torch.nan)
    layer.reset_parameters()
    for name, param in layer.named_parameters():
        assert param.isfinite().all(), name
    x = torch.randn(5, 6, dtype=torch.float64)
    assert layer(x).isfinite().all()


def test_reset_parameters_is_initialisation():
    torch.manual_seed(5)
    layer = fastmoe.MoE(64, 8, d_hidden=128)
    for param in layer.parameters():
        param.data.zero_()
    layer.reset_parameters()
    for name, fan_in in (("router.proj.weight", 64), ("experts.w1", 64), ("experts.b1", 64), ("experts.w2", 128)):
        bound = fan_in**-0.5
        assert 0.9 * bound < layer.get_parameter(name).abs().max() <= bound, name


def test_a_trained_activation_is_not_reset_by_construction():
    activation = nn.PReLU(init=0.125)
    activation.weight.data.fill_(0.75)
    fastmoe.MoE(6, 4, activation=activation, shared_d_hidden=3)
    assert activation.weight.item() == 0.75


CONSTRUCTION = [
    ({"num_experts": 0}, "num_experts must be a whole number >= 1, got 0"),
    ({"d_model": 0}, "d_model must be a whole number >= 1, got 0"),
    ({"d_model": 6.0}, "d_model must be a whole number >= 1, got 6.0"),
    ({"top_k": 0}, "top_k must be a whole number >= 1, got 0"),
    ({"top_k": 5}, "top_k must be at most num_experts, got top_k=5 of 4 experts"),
    ({"top_k": True}, "top_k must be a whole number"),
    ({"d_hidden": 0}, "d_hidden must be a whole number >= 1, got 0"),
    ({"shared_d_hidden": -1}, "shared_d_hidden must be a whole number >= 0, got -1"),
    ({"activation": "swigl"}, "unknown activation 'swigl'. Did you mean 'swiglu'"),
    ({"activation": 3}, "activation must be a name or a callable, got 3"),
    ({"router": "topp"}, "unknown router 'topp'. Did you mean 'topk'"),
    ({"router": 3}, "router must be a name, a module or a callable that returns a module, got 3"),
    ({"router": lambda d, e, k: 3}, "router must be a name, a module or a callable that returns a module, got 3"),
    ({"router": Compact(6, 5)}, "its router has"),
    ({"router": Compact, "router_options": {"a": 1}}, "router_options are for a router given by name"),
    ({"backend": "tritn"}, "unknown backend 'tritn'"),
    ({"dtype": torch.int32}, "dtype must be a floating type, got torch.int32"),
    ({"expert": nn.Linear(6, 6), "d_hidden": 5}, "d_hidden and dropout are for built-in experts"),
]


@pytest.mark.parametrize(("changes", "message"), CONSTRUCTION)
def test_bad_construction(changes, message):
    with pytest.raises(ValueError, match=message):
        fastmoe.MoE(**({"d_model": 6, "num_experts": 4} | changes))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.randn(5, 7),), r"x must be \(..., 6\), got \(5, 7\)"),
        ((torch.tensor(1.0),), r"x must be \(..., 6\), got \(\)"),
        ((torch.ones(5, 6, dtype=torch.int64),), "x must be floating, got torch.int64"),
        ((torch.ones(5, 6, dtype=torch.complex64),), "x must be floating, got torch.complex64"),
        ((torch.ones(5, 6).half(),), "rows are torch.float16, w1 is torch.float32"),
        ((torch.ones(5, 6), torch.ones(5)), r"token_mask must be bool \(5,\), got torch.float32 \(5,\)"),
        ((torch.ones(5, 6), torch.ones(5, 6) > 0), r"token_mask must be bool \(5,\), got torch.bool \(5, 6\)"),
        ((torch.ones(2, 3, 6), torch.ones(6, dtype=torch.bool)), r"token_mask must be bool \(2, 3\)"),
    ],
)  # fmt: skip
def test_bad_calls(arguments, message):
    with pytest.raises(ValueError, match=message):
        fastmoe.MoE(6, 4)(*arguments)


@pytest.mark.parametrize("kind", ["stacked", "modules", "own_router"])
def test_nan_logits(kind):
    x = torch.randn(5, 6).double()
    x[2, 3] = torch.nan
    with pytest.raises(ValueError, match=r"the router's weights must be finite; \d of 10 values are NaN or infinite"):
        build(kind, check=True)(x)
    y = build(kind)(x)  # without the check: no crash, no silent drop, and only the token itself is lost
    assert y[2].isnan().all()
    assert y[[0, 1, 3, 4]].isfinite().all()
    mask = torch.ones(5, dtype=torch.bool).index_fill(0, torch.tensor([2]), False)
    assert build(kind, check=True)(x, mask).isfinite().all()


def test_shapes_can_be_worked_out_on_the_meta_device():
    layer = fastmoe.MoE(16, 4, device="meta")
    assert layer(torch.empty(3, 16, device="meta")).shape == (3, 16)


def test_a_router_for_another_top_k_is_refused():
    with pytest.raises(ValueError, match="its router has"):
        fastmoe.MoE(16, 4, 2, router=fastmoe.routers.TopKRouter(16, 4, 1))


def test_a_router_that_moves_rows_is_found_out():
    class Moves(fastmoe.Router):
        def forward(self, x_TD):
            weights_TK, ids_TK = self.proj(x_TD).softmax(1).topk(self.top_k)
            routing = fastmoe.Routing.from_topk(ids_TK, weights_TK, self.num_experts)
            return dataclasses.replace(routing, token_ids_N=routing.token_ids_N.flip(0))

    with pytest.raises(ValueError, match="do not stand token by token"):
        fastmoe.MoE(8, 4, router=Moves)(torch.randn(5, 8))
