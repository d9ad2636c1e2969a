"""Options of `moefy`: which go with upcycling, and errors that leave the model as it was."""

import pytest
import torch
from dense_blocks import CASES, D, H, Network
from torch import Tensor, nn

import fastmoe
from fastmoe.convert import moefy

E = 4
gelu_block = CASES["nanogpt_no_bias"].make


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"init": "upcycl"}, "unknown init 'upcycl'. Did you mean 'upcycle'"),
        ({"dhidden": 3}, "unknown moefy option 'dhidden'. Did you mean 'd_hidden'"),
        ({"evry": 2}, "Did you mean 'every'"),
        ({"d_hidden": H + 1}, "which has d_hidden=20; got d_hidden=21"),
        ({"activation": "relu"}, "which has activation='gelu'; got activation='relu'"),
        ({"bias": True}, "which has bias=False; got bias=True"),
        ({"expert": lambda: nn.Linear(D, D)}, "give expert= with init='random'"),
        ({"router": "soft"}, "use router='soft' with init='random'"),
        ({"router_options": {"normalize": False}}, "must sum to 1"),
        ({"router_options": {"normalise": True}}, "Did you mean 'normalize'"),
        ({"router": "topq"}, "Did you mean 'topk'"),
        ({"top_k": 5}, "top_k must be at most num_experts"),
        ({"num_experts": 0}, "num_experts must be a whole number >= 1"),
        ({"num_experts": 2.0, "target": nn.LayerNorm}, "num_experts must be a whole number >= 1"),
    ],
)
def test_bad_options_leave_the_model_as_it_was(options: dict[str, object], message: str) -> None:
    model = Network(gelu_block)
    modules = dict(model.named_modules())
    with pytest.raises(ValueError) as raised:
        moefy(model, **{"num_experts": E, **options})
    assert message in str(raised.value)
    assert dict(model.named_modules()) == modules


def test_options_that_say_what_the_block_has_are_welcome() -> None:
    model = moefy(Network(gelu_block), E, d_hidden=H, activation="gelu", bias=False, d_model=D)
    assert isinstance(model.h[0]["mlp"], fastmoe.MoE)


def test_an_option_of_none_leaves_the_choice_to_the_block() -> None:
    model = moefy(Network(gelu_block), E, d_hidden=None, expert=None, dtype=None, router_options=None)
    assert model.h[0]["mlp"].experts.w1.shape == (E, H, D)


@pytest.mark.parametrize("top_k", [1, 3])
def test_normalization_when_upcycling(top_k: int) -> None:
    router = moefy(Network(gelu_block), E, top_k).h[0]["mlp"].router
    assert router.normalize == ("stop_gradient" if top_k == 1 else True)
    router = moefy(Network(gelu_block), E, top_k, router_options={"normalize": True}).h[0]["mlp"].router
    assert router.normalize is True
    router = moefy(Network(gelu_block), E, 1, init="random").h[0]["mlp"].router
    assert router.normalize is False


def test_random_experts_may_be_of_another_kind() -> None:
    moe = moefy(Network(gelu_block), E, init="random", d_hidden=7, activation="swiglu", bias=True).h[0]["mlp"]
    assert moe.experts.w1.shape == (E, 14, D)
    model = moefy(Network(CASES["timm"].make), E, init="random", expert=lambda: nn.Linear(D, D))
    assert type(model.h[1]["mlp"].experts.modules_list[0]) is nn.Linear
    assert model(torch.randn(3, D)).shape == (3, D)


@pytest.mark.parametrize("name", ["timm", "llama"])
def test_a_shared_expert_starts_silent_and_learns(name: str) -> None:
    model = Network(CASES[name].make).eval()
    x = torch.randn(50, D)
    expected = model(x)
    moefy(model, E, shared_d_hidden=6)
    torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-5)
    model(x).square().sum().backward()
    assert model.h[0]["mlp"].shared.w2.weight.grad.abs().sum() > 0


def test_dropout_may_be_changed() -> None:
    assert moefy(Network(CASES["t5"].make), E, dropout=0.5).h[0]["mlp"].experts.dropout == 0.5


def test_modules_among_the_options_are_not_shared_by_layers() -> None:
    class Mine(fastmoe.Router):
        def forward(self, x_TD: Tensor) -> fastmoe.Routing:
            weights_TK, ids_TK = self.proj(x_TD).softmax(1).topk(self.top_k)
            return fastmoe.Routing.from_topk(ids_TK, weights_TK, self.num_experts)

    one, two = (layer["mlp"] for layer in moefy(Network(gelu_block), E, router=Mine(D, E, 2)).h)
    assert isinstance(one.router, Mine)
    assert one.router is not two.router
    one, two = (layer["mlp"] for layer in moefy(Network(gelu_block), E, init="random", expert=nn.Linear(D, D)).h)
    assert one.experts.modules_list[0] is not two.experts.modules_list[0]


@pytest.mark.parametrize("name", ["d_hidden", "activation", "bias", "dropout"])
def test_a_replicated_block_keeps_its_inside(name: str) -> None:
    model = Network(lambda: nn.Linear(D, D))
    with pytest.raises(ValueError, match=f"replicated as it is, because its inside is not known; {name}="):
        moefy(model, E, target="*.mlp", **{name: 1})


def test_moe_arguments_go_through() -> None:
    moe = moefy(Network(gelu_block), E, backend="reference", check=True, router_options={"z_loss_weight": 0.1}).h[0][
        "mlp"
    ]
    assert (moe.backend, moe.check, moe.router.z_loss_weight) == ("reference", True, 0.1)


@pytest.mark.parametrize("name", ["topk", "gshard", "loss_free", "hash", "random", "switch", "base", "expert_choice"])
def test_upcycling_with_a_router_by_name_keeps_outputs_or_says_that_it_does_not(name, caplog):
    block = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8)).eval()
    x, ids = torch.randn(12, 8), torch.randint(5, (12,))
    before = block(x)
    options = {"hash": {"vocab_size": 5}, "gshard": {"eval_capacity_factor": 4.0}}.get(name)
    top_k = 1 if name in ("switch", "base") else 2
    moe = fastmoe.moefy(block, num_experts=4, top_k=top_k, router=name, router_options=options)
    changed = (moe(x, token_ids=ids) - before).abs().max() > 1e-4
    assert changed == (name in ("switch", "base", "expert_choice"))
    assert [f"the weights of router {name!r} do not sum to 1" in r.getMessage() for r in caplog.records] == [
        True
    ] * changed
