"""Naming blocks: classes, globs, predicates, every n-th; and what cannot be a target."""

from collections.abc import Callable

import pytest
import torch
from dense_blocks import CASES, D, H, Network, Plain, Residual, TokenShift
from torch import Tensor, nn

import fastmoe
from fastmoe.convert import moefy
from fastmoe.experts import MLPExperts, ModuleExperts

E = 4
gelu_block = CASES["nanogpt_no_bias"].make


class Bottleneck(nn.Module):
    """A block that no row of the table knows."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.squeeze, self.mix, self.expand = (
            nn.LayerNorm(D),
            nn.Linear(D, 5),
            nn.Linear(5, 5),
            nn.Linear(5, D),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.expand(torch.tanh(self.mix(self.squeeze(self.norm(x)))))


def moe_names(model: nn.Module) -> list[str]:
    return [name for name, m in model.named_modules(remove_duplicate=False) if isinstance(m, fastmoe.MoE)]


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        ("auto", ["h.0.mlp", "h.1.mlp", "h.2.mlp", "h.3.mlp"]),
        ("h.*.mlp", ["h.0.mlp", "h.1.mlp", "h.2.mlp", "h.3.mlp"]),
        ("h.[13].mlp", ["h.1.mlp", "h.3.mlp"]),
        ("*mlp*", ["h.0.mlp", "h.1.mlp", "h.2.mlp", "h.3.mlp"]),
        (Plain, ["h.0.mlp", "h.1.mlp", "h.2.mlp", "h.3.mlp"]),
        (lambda name, module: name.startswith("h.2") and isinstance(module, Plain), ["h.2.mlp"]),
    ],
)
def test_targets(target: str | type[nn.Module] | Callable[[str, nn.Module], bool], expected: list[str]) -> None:
    model = Network(gelu_block, depth=4)
    x = torch.randn(6, D)
    before = model(x)
    assert moe_names(moefy(model, E, target=target)) == expected
    torch.testing.assert_close(model(x), before, rtol=1e-5, atol=1e-5)
    again = dict(model.named_modules())
    assert dict(moefy(model, E, target=target).named_modules()) == again


@pytest.mark.parametrize("target", ["auto", "h.*.mlp", Plain, lambda name, module: isinstance(module, Plain)])
def test_every_second_block_also_in_a_second_call(target: str | type[nn.Module]) -> None:
    model = Network(gelu_block, depth=5)
    for _ in range(2):
        assert moe_names(moefy(model, E, target=target, every=2)) == ["h.1.mlp", "h.3.mlp"]


@pytest.mark.parametrize("every", [0, -1, 1.5, True, "2"])
def test_every_must_be_a_positive_whole_number(every: int) -> None:
    with pytest.raises(ValueError, match="every must be a whole number >= 1"):
        moefy(Network(gelu_block), E, every=every)


def test_the_model_itself_may_be_the_block() -> None:
    block = gelu_block()
    x = torch.randn(3, D)
    expected = block(x)
    moe = moefy(block, E)
    assert isinstance(moe, fastmoe.MoE)
    torch.testing.assert_close(moe(x), expected, rtol=1e-5, atol=1e-5)


def test_one_block_in_several_places_becomes_one_moe() -> None:
    block = gelu_block()
    model = Network(lambda: block, depth=3)
    model.alias = block
    moefy(model, E)
    assert isinstance(model.alias, fastmoe.MoE)
    assert all(layer["mlp"] is model.alias for layer in model.h)


def test_blocks_with_tied_weights_are_left_alone() -> None:
    model = Network(gelu_block)
    model.h[1]["mlp"].c_fc.weight = model.h[0]["mlp"].c_fc.weight
    with pytest.raises(ValueError, match="shares a parameter"):
        moefy(model, E)


def test_frozen_weights_stay_frozen() -> None:
    model = Network(CASES["only_up_bias"].make)
    for layer in model.h:
        layer["mlp"].fc1.requires_grad_(False)
    experts = moefy(model, E).h[0]["mlp"].experts
    assert isinstance(experts, MLPExperts)
    frozen = {name: not parameter.requires_grad for name, parameter in experts.named_parameters()}
    assert frozen == {"w1": True, "b1": True, "w2": False, "b2": True}, "the dense block had no second bias to train"
    assert model.h[0]["mlp"].router.proj.weight.requires_grad


@pytest.mark.parametrize("init", ["upcycle", "random"])
def test_unknown_blocks_are_replicated(init: str) -> None:
    model = Network(Bottleneck)
    block = model.h[0]["mlp"]
    x = torch.randn(40, D)
    expected = model(x)
    moefy(model, E, target=Bottleneck, init=init)
    experts = model.h[0]["mlp"].experts
    assert isinstance(experts, ModuleExperts)
    assert (experts.modules_list[0] is block) == (init == "upcycle")
    assert torch.equal(experts.modules_list[1].mix.weight, block.mix.weight) == (init == "upcycle")
    assert torch.allclose(model(x), expected, rtol=1e-5, atol=1e-5) == (init == "upcycle")
    model(x).square().sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_width_of_a_replicated_block() -> None:
    class Scale(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.randn(D))

        def forward(self, x: Tensor) -> Tensor:
            return x * self.scale

    with pytest.raises(ValueError, match=r"cannot tell the width of block 'h\.0\.mlp'"):
        moefy(Network(Scale), E, target=Scale)
    model = Network(Scale)
    x = torch.randn(4, D)
    expected = model(x)
    torch.testing.assert_close(moefy(model, E, target=Scale, d_model=D)(x), expected)
    with pytest.raises(ValueError, match=f"has width {D}, got d_model=5"):
        moefy(Network(gelu_block), E, d_model=5)


def test_what_cannot_be_an_expert() -> None:
    class Two(nn.Linear):
        def forward(self, x: Tensor, residual: Tensor) -> Tensor:
            return super().forward(x) + residual

    layer = nn.TransformerEncoderLayer(D, 2, H)
    for model, target, reason in (
        (Network(lambda: Two(D, D)), Two, r"needs more than one argument \(residual\)"),
        (Network(TokenShift), TokenShift, "mixes tokens"),
        (nn.ModuleList([gelu_block()]), nn.ModuleList, "has no forward"),
        (nn.ModuleDict({"a": layer.self_attn}), nn.MultiheadAttention, "needs more than one argument"),
    ):
        with pytest.raises(ValueError, match=reason):
            moefy(model, E, target=target)


def test_a_layer_of_another_width_out() -> None:
    model = nn.Sequential(nn.Linear(D, D), nn.Linear(D, 3))
    x = torch.randn(2, 5, D)
    expected = model(x)
    torch.testing.assert_close(moefy(model, E, target="1")(x), expected)


def test_experts_of_another_moe_are_left_alone() -> None:
    with pytest.raises(ValueError, match="an expert of another MoE"):
        moefy(nn.ModuleDict({"experts": nn.ModuleList(gelu_block() for _ in range(3))}), E)


def test_nothing_matched_says_what_there_is() -> None:
    model = Network(Bottleneck)
    with pytest.raises(ValueError) as raised:
        moefy(model, E)
    for part in (
        "no known feed-forward block in Network",
        "2 Bottleneck",
        "6 Linear",
        "target=MyFeedForward",
        "'layers.*.mlp'",
    ):
        assert part in str(raised.value)
    with pytest.raises(ValueError, match=r"nothing that target='h\.\*\.ffn' names"):
        moefy(model, E, target="h.*.ffn")
    assert not moe_names(model)


def test_existing_moe_layers_are_left_alone() -> None:
    inner = fastmoe.MoE(D, E, expert=lambda: Residual())
    model = nn.Sequential(inner, fastmoe.MoE(D, E, expert=gelu_block))
    assert moefy(model, 8) is model
    assert moefy(model, 8, target=Residual) is model
    assert model[0] is inner
    assert inner.num_experts == E


@pytest.mark.parametrize("target", [3, None, dict, nn.Linear(2, 2)])
def test_targets_of_another_kind(target: object) -> None:
    with pytest.raises(ValueError, match="target must be"):
        moefy(Network(gelu_block), E, target=target)
