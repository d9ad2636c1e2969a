"""Every row of the table: the outputs stay, activation and dropout stay, and look-alikes are left alone."""

import copy
import pickle

import pytest
import torch
from dense_blocks import CASES, LOOK_ALIKES, Case, D, H, Network, P, Plain
from torch import nn

import fastmoe
from fastmoe.convert import PATTERNS, moefy
from fastmoe.experts import MLPExperts

E = 4


def without_dropout(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


def the_moe(model: nn.Module) -> fastmoe.MoE:
    return next(m for m in model.modules() if isinstance(m, fastmoe.MoE))


def assert_same(got: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-5) -> None:
    assert torch.isfinite(got).all()
    assert (got - expected).abs().max() <= tolerance * expected.abs().max()


@pytest.fixture(params=CASES.values(), ids=CASES.keys())
def case(request: pytest.FixtureRequest) -> Case:
    return request.param


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("top_k", [1, 2, 4])
@pytest.mark.parametrize("training", [False, True])
def test_upcycling_keeps_the_outputs(case: Case, top_k: int, training: bool) -> None:
    model = without_dropout(Network(case.make)).train(training)
    x = 2 * torch.randn(3, 7, D)
    expected = model(x)
    converted = moefy(model, E, top_k)
    assert converted is model
    assert [m.training for m in converted.modules()] == [training] * len(list(converted.modules()))
    assert_same(converted(x), expected)
    assert sum(isinstance(m, fastmoe.MoE) for m in converted.modules()) == 2
    assert isinstance(the_moe(model).experts, MLPExperts)


def test_activation_and_dropouts_are_kept(case: Case) -> None:
    moe = the_moe(moefy(Network(case.make), E))
    assert isinstance(moe.experts, MLPExperts)
    assert moe.experts.dropout == case.inner
    assert moe.experts.activation == case.activation if case.activation else callable(moe.experts.activation)
    output = getattr(moe, "output_dropout", None)
    assert (output and output.p) == case.output


def test_every_row_of_the_table_has_a_case() -> None:
    covered = {frozenset(name for name, _ in case.make().named_children()) for case in CASES.values()}
    assert [row for row in PATTERNS if not any(set(row.names) <= names for names in covered)] == []


def test_random_experts_differ_run_and_train(case: Case) -> None:
    model = without_dropout(Network(case.make))
    x = torch.randn(64, D)
    expected = model(x)
    model = moefy(model, E, init="random")
    model(x).square().mean().backward()
    w1 = the_moe(model).experts.w1
    assert not torch.equal(w1[0], w1[1])
    assert not torch.allclose(model(x), expected)
    assert all(p.grad is not None for p in model.parameters())


def test_gradients_reach_the_router_and_all_experts() -> None:
    for top_k in (1, 2):
        model = moefy(Network(CASES["nanogpt"].make), E, top_k, router_options={"aux_loss_weight": 0.0})
        (model(torch.randn(256, D)) * torch.randn(256, D)).sum().backward()
        moe = the_moe(model)
        assert moe.router.proj.weight.grad.abs().sum() > 0
        for parameter in moe.experts.parameters():
            assert (parameter.grad.flatten(1).abs().sum(1) > 0).all()


def test_dropout_acts_in_training_only() -> None:
    moe = moefy(Plain("fc1", "fc2", nn.GELU(), output=P), E)
    x = torch.randn(500, D)
    share = (moe(x) == 0).float().mean()
    assert abs(share - P) < 0.05
    assert torch.equal(moe.eval()(x), moe(x))


def test_verification_leaves_no_trace(case: Case) -> None:
    model = Network(case.make)
    before, rng = pickle.dumps([t.numpy() for t in model.state_dict().values()]), torch.get_rng_state()
    with pytest.raises(ValueError, match="every=9"):
        moefy(model, E, every=9)
    assert torch.equal(torch.get_rng_state(), rng)
    assert pickle.dumps([t.numpy() for t in model.state_dict().values()]) == before
    assert all(m.training for m in model.modules())


@pytest.mark.parametrize("kind", LOOK_ALIKES, ids=lambda kind: kind.__name__)
def test_look_alikes_are_left_alone(kind: type[nn.Module], caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(ValueError, match="Looks like one") as raised:
        moefy(Network(kind), E)
    assert LOOK_ALIKES[kind] in str(raised.value)
    blocks = iter([kind(), CASES["timm"].make()])
    model = moefy(Network(lambda: next(blocks)), E)
    assert type(model.h[0]["mlp"]) is kind
    assert isinstance(model.h[1]["mlp"], fastmoe.MoE)
    assert "left out (name it by target= to replicate it): h.0.mlp" in caplog.text


@pytest.mark.parametrize("kind", [k for k in LOOK_ALIKES if k.__name__ != "TokenShift"], ids=lambda kind: kind.__name__)
def test_look_alikes_named_by_target_are_replicated(kind: type[nn.Module], caplog: pytest.LogCaptureFixture) -> None:
    model = Network(kind).eval()
    x = torch.randn(3, 7, D)
    expected = model(x)
    moefy(model, E, target=kind)
    assert_same(model(x), expected)
    assert type(the_moe(model).experts.modules_list[3]) is kind
    assert "replicated as it is" in caplog.text


def test_other_linear_layers_are_not_taken_for_plain_ones() -> None:
    class Adapted(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) * 1.0

    block = CASES["timm"].make()
    block.fc1 = Adapted(D, H)
    normed = CASES["timm"].make()
    nn.utils.parametrizations.weight_norm(normed.fc2)
    hooked = CASES["timm"].make()
    hooked.fc1.register_forward_hook(lambda *_: None)
    for odd, reason in ((block, "plain Linear"), (normed, "plain Linear"), (hooked, "hooks")):
        with pytest.raises(ValueError, match=reason):
            moefy(nn.ModuleDict({"mlp": odd}), E)


def test_shapes_that_are_no_feed_forward_block_do_not_match() -> None:
    with pytest.raises(ValueError, match="no known feed-forward block") as raised:
        moefy(nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)), E)
    assert "Looks like" not in str(raised.value)


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.bfloat16, 0.03), (torch.float16, 4e-3), (torch.float64, 1e-12)]
)
def test_dtype_is_kept(dtype: torch.dtype, tolerance: float) -> None:
    for name in ("nanogpt", "llama", "gpt2"):
        model = without_dropout(Network(CASES[name].make)).to(dtype)
        x = torch.randn(9, D, dtype=dtype)
        expected = model(x)
        moefy(model, E)
        assert {p.dtype for p in model.parameters()} == {dtype}
        assert_same(model(x), expected, tolerance)


def test_meta_device(case: Case) -> None:
    with torch.device("meta"):
        model = Network(case.make)
    moefy(model, E)
    assert {p.device.type for p in model.parameters()} == {"meta"}
    assert sum(isinstance(m, fastmoe.MoE) for m in model.modules()) == 2
    assert isinstance(the_moe(model).experts, MLPExperts)


def test_meta_look_alike() -> None:
    with torch.device("meta"):
        model = Network(next(iter(LOOK_ALIKES)))
    with pytest.raises(ValueError, match="does not compute"):
        moefy(model, E)


def test_copies_and_state_dict_round_trip(case: Case) -> None:
    if case.activation is None:
        pytest.skip("these cases hold a lambda or a local function")
    model = moefy(Network(case.make), E).eval()
    x = torch.randn(5, D)
    expected = model(x)
    fresh = moefy(Network(case.make), E, init="random").eval()
    fresh.load_state_dict(model.state_dict())
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), fresh):
        assert torch.equal(twin(x), expected)
