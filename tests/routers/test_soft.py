"""The soft router and its layer against loops over sequences, slots and tokens."""

import pytest
import torch
from helpers import gradients
from torch import nn

import fastmoe
from fastmoe.routers import RoutingContext, SoftRouter, SoftRouting, check_routing

KINDS = {
    "stacked": {"d_hidden": 5},
    "gated": {"d_hidden": 5, "activation": "swiglu", "bias": False},
    "callable": {"d_hidden": 5, "activation": torch.sin},
    "modules": {"expert": lambda: nn.Linear(6, 4)},
    "shared": {"d_hidden": 5, "shared_d_hidden": 3},
}


def build(kind="stacked", slots=1, normalize=True, **changes):
    options = {"slots_per_expert": slots, "normalize": normalize}
    return fastmoe.MoE(6, 3, router="soft", router_options=options, **(KINDS[kind] | changes)).double()


def expert(layer, e, x):
    experts = layer.experts
    if hasattr(experts, "modules_list"):
        return experts.modules_list[e](x.unsqueeze(0))[0]
    pre = experts.w1[e] @ x + (0 if experts.b1 is None else experts.b1[e])
    if experts.activation == "swiglu":
        hidden = nn.functional.silu(pre[:5]) * pre[5:]
    else:
        hidden = nn.functional.gelu(pre) if experts.activation == "gelu" else experts.activation(pre)
    return experts.w2[e] @ hidden + (0 if experts.b2 is None else experts.b2[e])


def logit(router, token, phi):
    if router.scale is None:
        return token @ phi
    return router.scale[0] * (token / (token.norm() + 1e-6)) @ (phi / (phi.norm() + 1e-6))


def sequence_loop(layer, tokens):
    """Outputs of one sequence without padding, and the weight of each slot in each of them."""
    router = layer.router
    exps = [[torch.exp(logit(router, token, phi)) for phi in router.proj.weight] for token in tokens]
    outs = []
    for slot in range(len(router.proj.weight)):
        total = sum(row[slot] for row in exps)
        mean = sum(row[slot] / total * token for row, token in zip(exps, tokens, strict=True))
        outs.append(expert(layer, slot // router.slots_per_expert, mean))
    weights = [[value / sum(row) for value in row] for row in exps]
    ys = [sum(w * out for w, out in zip(row, outs, strict=True)) for row in weights]
    if layer.shared is not None:
        ys = [y + layer.shared(token) for y, token in zip(ys, tokens, strict=True)]
    return ys, weights


def loop(layer, x_BSD, mask_BS):
    width = 4 if hasattr(layer.experts, "modules_list") else 6
    y_BSO = []
    for x_SD, mask_S in zip(x_BSD, mask_BS, strict=True):
        kept = [token for token, counts in zip(x_SD, mask_S, strict=True) if counts]
        ys = iter(sequence_loop(layer, kept)[0] if kept else [])
        y_BSO.append(torch.stack([next(ys) if counts else torch.zeros(width).double() for counts in mask_S]))
    return torch.stack(y_BSO)


def run(forward, layer, x, upstream):
    layer.zero_grad()
    leaf = x.clone().requires_grad_()
    y = forward(leaf)
    y.backward(upstream[..., : y.shape[-1]])
    return {"y": y.detach(), "x": leaf.grad, **gradients(layer)}


def assert_close(got, expected):
    assert got.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(got[name], expected[name], msg=lambda m, n=name: f"{n}: {m}")


MASKS = {
    "all": torch.ones(3, 4, dtype=torch.bool),
    "some": torch.tensor([[1, 1, 0, 0], [0, 1, 0, 1], [1, 1, 1, 1]]).bool(),
    "a_sequence_of_padding": torch.tensor([[1, 1, 1, 0], [0, 0, 0, 0], [0, 0, 1, 0]]).bool(),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("slots", [1, 3])
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("mask", MASKS)
def test_the_formula(kind, slots, normalize, mask):
    layer, mask_BS = build(kind, slots, normalize), MASKS[mask]
    x, upstream = torch.randn(2, 3, 4, 6).double()
    expected = run(lambda leaf: loop(layer, leaf, mask_BS), layer, x, upstream)
    given = None if mask == "all" else mask_BS
    for rubbish in (0.0, torch.nan, torch.inf):
        padded = torch.where(mask_BS.unsqueeze(2), x, rubbish)
        got = run(lambda leaf: layer(leaf, given), layer, padded, upstream)
        assert_close(got, expected)


@pytest.mark.parametrize("slots", [1, 3])
def test_statistics(slots):
    layer, mask_BS = build(slots=slots), MASKS["a_sequence_of_padding"]
    x, seen = torch.randn(3, 4, 6).double(), []

    class Watch:
        def observe(self, routing, offsets_E, token_mask_T):
            seen.append((routing, offsets_E, token_mask_T))

    layer.observers.append(Watch())
    layer(x, mask_BS)
    stats = fastmoe.stats(layer)[""]
    assert stats.counts.tolist() == [3 * slots] * 3
    assert (stats.dropped, stats.losses, stats.dead) == (0, {}, [])
    entropies = []
    for b in range(3):
        rows = sequence_loop(layer, list(x[b][mask_BS[b]]))[1] if mask_BS[b].any() else []
        for row in rows:
            shares = [sum(row[e * slots : (e + 1) * slots]) for e in range(3)]
            entropies.append(-sum(s * s.log() for s in shares).item())
    assert stats.entropy == pytest.approx(sum(entropies) / len(entropies))
    ((routing, offsets_E, token_mask_T),) = seen
    assert isinstance(routing, SoftRouting)
    assert torch.equal(offsets_E, stats.offsets_E)
    assert offsets_E.dtype == torch.int32
    assert torch.equal(token_mask_T, mask_BS.flatten())


def test_weights_sum_to_one_and_padding_has_none():
    router, mask_BS = SoftRouter(6, 3, slots_per_expert=2).double(), MASKS["some"]
    routing = router(torch.randn(12, 6).double(), RoutingContext(mask_BS.flatten(), num_sequences=3))
    torch.testing.assert_close(routing.dispatch_BSL.sum(1), torch.ones(3, 6).double())
    torch.testing.assert_close(routing.combine_BSL.sum(2), torch.ones(3, 4).double())
    assert (routing.dispatch_BSL[~mask_BS] == 0).all()


@pytest.mark.parametrize("slots", [1, 3])
def test_sequences_do_not_see_each_other(slots):
    layer, x = build(slots=slots), torch.randn(2, 3, 4, 6).double()
    each = torch.stack([torch.stack([layer(sequence) for sequence in part]) for part in x])
    torch.testing.assert_close(layer(x), each)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(0, 6), (2, 0, 6), (0, 4, 6)])
def test_no_token(kind, shape):
    layer = build(kind, slots=3)
    got = run(layer, layer, torch.randn(shape).double(), torch.zeros(shape).double())
    assert got["y"].shape[:-1] == shape[:-1]
    assert all((grad == 0).all() for grad in got.values())


def test_nothing_but_padding():
    layer = build()
    x = torch.full((2, 3, 6), torch.nan).double()
    got = run(lambda leaf: layer(leaf, torch.zeros(2, 3).bool()), layer, x, torch.randn(2, 3, 6).double())
    assert all((value == 0).all() for value in got.values())
    assert fastmoe.stats(layer)[""].entropy == 0


@pytest.mark.parametrize("shape", [(6,), (1, 6), (1, 1, 6)])
def test_one_token_is_in_every_slot(shape):
    layer, x = build(), torch.randn(6).double()
    weights = layer.router(x.unsqueeze(0)).combine_BSL[0, 0]
    expected = sum(weights[e] * expert(layer, e, x) for e in range(3))
    torch.testing.assert_close(layer(x.reshape(shape)), expected.reshape(shape))


def test_a_zero_token_gives_finite_gradients():
    layer = build()
    got = run(layer, layer, torch.zeros(2, 3, 6).double(), torch.randn(2, 3, 6).double())
    assert all(value.isfinite().all() for value in got.values())


@pytest.mark.parametrize("kind", KINDS)
def test_bfloat16_and_autocast(kind):
    layer = build(kind, slots=2).float()
    x = torch.randn(2, 16, 6)
    exact = layer(x)
    with torch.autocast("cpu", torch.bfloat16):
        half = layer(x)
    half.sum().backward()
    assert {grad.dtype for grad in gradients(layer).values()} == {torch.float32}
    low = layer.bfloat16()(x.bfloat16())
    assert low.dtype == half.dtype == torch.bfloat16
    for y in (half, low):
        assert (y - exact).norm() <= 0.03 * exact.norm()


@pytest.mark.parametrize("autocast", [False, True])
def test_weights_are_float32_at_least(autocast):
    router, x = SoftRouter(64, 4).bfloat16(), torch.randn(20, 64).bfloat16()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        routing = router(x)
    logits = nn.functional.normalize(x.float()) @ nn.functional.normalize(router.proj.weight.float()).T
    assert routing.dispatch_BSL.dtype == routing.combine_BSL.dtype == torch.float32
    torch.testing.assert_close(routing.combine_BSL[0], logits.softmax(1))


def test_it_learns():
    layer = fastmoe.MoE(6, 4, router="soft", router_options={"slots_per_expert": 2}, d_hidden=32)
    x = torch.randn(32, 5, 6)
    target = x.cumsum(1)[:, -1:].tanh().expand_as(x)  # a token alone does not know it
    optimizer = torch.optim.Adam(layer.parameters(), 0.01)
    losses = []
    for _ in range(200):
        loss = nn.functional.mse_loss(layer(x), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.2 * losses[0]
    assert layer.router.scale.item() != 1


def test_parameters():
    router = build(slots=2).router
    assert {n: tuple(p.shape) for n, p in router.named_parameters()} == {"proj.weight": (6, 6), "scale": (1,)}
    for param in router.parameters():
        param.data.fill_(torch.nan)
    router.reset_parameters()
    assert router.scale.item() == 1
    assert router.proj.weight.isfinite().all()
    assert "slots_per_expert=2" in repr(router)
    assert build(normalize=False).router.scale is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"slots_per_expert": 0}, "slots_per_expert must be a whole number >= 1, got 0"),
        ({"normalize": "yes"}, "normalize must be True or False, got 'yes'"),
        ({"slots": 2}, "unknown option of router 'soft' 'slots'"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        fastmoe.MoE(6, 3, router="soft", router_options=options)


def test_sequences_of_unequal_length():
    with pytest.raises(ValueError, match="7 tokens do not make 3 sequences of one length"):
        SoftRouter(6, 3)(torch.randn(7, 6), RoutingContext(num_sequences=3))


@pytest.mark.parametrize(
    ("dispatch", "combine", "message"),
    [
        (torch.rand(2, 4, 6), torch.rand(2, 4, 5), r"combine weights must be floating \(B, S, 6\)"),
        (torch.rand(2, 3, 6), torch.rand(2, 4, 6), "dispatch weights must be floating"),
        (torch.rand(2, 4, 6), torch.rand(1, 8, 6), "combine weights must be floating"),
        (torch.rand(8, 6), torch.rand(8, 6), "dispatch weights must be floating"),
        (torch.ones(2, 4, 6).long(), torch.rand(2, 4, 6), "dispatch weights must be floating"),
        (torch.rand(2, 4, 6), torch.full((2, 4, 6), torch.nan), "combine weights must be finite; 48 of 48"),
    ],
)
def test_answers_that_do_not_fit(dispatch, combine, message):
    with pytest.raises(ValueError, match=message):
        check_routing(SoftRouting(dispatch, combine, 8, 3, 2), 8, 3)


def test_a_soft_router_must_know_padding():
    class Blind(fastmoe.Router):
        def forward(self, x_TD):
            weights_1TE = self.proj(x_TD).softmax(1).unsqueeze(0)
            return SoftRouting(weights_1TE, weights_1TE, len(x_TD), self.num_experts, 1)

    layer, x = fastmoe.MoE(6, 3, router=Blind), torch.randn(4, 6)
    assert layer(x).shape == (4, 6)
    with pytest.raises(ValueError, match="must set takes_context"):
        layer(x, torch.tensor([True, True, False, True]))


def test_every_expert_is_active():
    found = fastmoe.summary(build())
    assert found.active_params == found.total_params


def test_compiled():
    layer, x = build(slots=2), torch.randn(2, 5, 6).double()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), layer(x))
