"""torch's own Transformer: encoder, decoder, their fused eval paths, copies and subclasses."""

import copy
import io
import pickle
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastmoe
from fastmoe.convert import moefy

D, H, E = 16, 24, 4
MASK = torch.tensor([[0, 0, 0, 0, 0], [0, 0, 0, 1, 1], [0, 0, 1, 1, 1]]).bool()
pytestmark = pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors", "ignore:enable_nested_tensor")


class MyEncoderLayer(nn.TransformerEncoderLayer):
    """A subclass with a twist in its attention; its feed-forward part is torch's."""

    def _sa_block(self, *args: object, **kwargs: object) -> Tensor:
        return 0.5 * super()._sa_block(*args, **kwargs)


class OwnFeedForward(nn.TransformerEncoderLayer):
    def _ff_block(self, x: Tensor) -> Tensor:
        return super()._ff_block(x) * 2


def encoder(
    kind: type[nn.TransformerEncoderLayer] = nn.TransformerEncoderLayer, **options: object
) -> nn.TransformerEncoder:
    layer = kind(D, 4, H, **{"dropout": 0.0, "batch_first": True, **options})
    model = nn.TransformerEncoder(layer, 2)
    for parameter in model.parameters():
        nn.init.uniform_(parameter, -0.3, 0.3)
    return model


def decoder(**options: object) -> nn.TransformerDecoder:
    return nn.TransformerDecoder(nn.TransformerDecoderLayer(D, 4, H, dropout=0.0, batch_first=True, **options), 2)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def assert_same(got: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("top_k", [1, 2, 4])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"norm_first": True},
        {"activation": "gelu"},
        {"activation": F.silu},
        {"bias": False},
        {"activation": nn.Tanh()},
    ],
    ids=["defaults", "norm_first", "gelu", "silu", "no bias", "tanh"],
)
def test_encoder_keeps_its_outputs(options: dict[str, object], training: bool, top_k: int) -> None:
    model = encoder(**options).train(training)
    x = torch.randn(3, 5, D)
    expected = model(x)
    moefy(model, E, top_k)
    assert_same(model(x), expected)
    assert isinstance(model.layers[0].moe, fastmoe.MoE)
    assert isinstance(model.layers[0], nn.TransformerEncoderLayer)
    assert not any("linear" in name for name, _ in model.named_parameters())


@pytest.mark.parametrize("every", [1, 2])
@pytest.mark.parametrize(
    "part", [lambda m: m, lambda m: m.layers, lambda m: m.layers[0]], ids=["model", "layers", "layer"]
)
def test_fused_eval_path(part: Callable[[nn.Module], nn.Module], every: int) -> None:
    model = encoder().eval()
    if part(model) is model.layers[0] and every == 2:
        pytest.skip("one layer has no second")
    x = torch.randn(3, 5, D)
    with torch.no_grad():
        expected, padded = model(x), model(x, src_key_padding_mask=MASK)
        moefy(part(model), E, every=every)
        assert_same(model(x), expected)
        assert_same(model(x, src_key_padding_mask=MASK)[~MASK], padded[~MASK])
    assert_same(model(x, src_key_padding_mask=MASK)[~MASK], padded[~MASK])


def test_frozen_dense_weights_and_a_padding_mask() -> None:
    model = encoder().eval().requires_grad_(False)
    x = torch.randn(3, 5, D)
    padded = model(x, src_key_padding_mask=MASK)
    moefy(model, E, every=2)
    assert_same(model(x, src_key_padding_mask=MASK)[~MASK], padded[~MASK])


def test_nested_tensors() -> None:
    model = encoder().eval()
    x = torch.nested.as_nested_tensor([torch.randn(n, D) for n in (5, 3, 1)])
    with torch.no_grad():
        expected = [t.clone() for t in model(x).unbind()]
        got = moefy(model, E)(x).unbind()
    for mine, theirs in zip(got, expected, strict=True):
        assert_same(mine, theirs)


def test_decoder_and_whole_transformer() -> None:
    tgt, memory = torch.randn(2, 4, D), torch.randn(2, 6, D)
    transformer = nn.Transformer(D, 4, 2, 2, H, dropout=0.0, batch_first=True)
    for model, inputs in (
        (decoder(), (tgt, memory)),
        (decoder(norm_first=True), (tgt, memory)),
        (transformer, (memory, tgt)),
    ):
        for training in (True, False):
            twin = copy.deepcopy(model).train(training)
            expected = twin(*inputs)
            assert_same(moefy(twin, E)(*inputs), expected)
    assert len(fastmoe.stats(twin)) == 4


def test_dropouts_stay_in_their_places() -> None:
    layer = moefy(nn.TransformerDecoderLayer(D, 4, H, dropout=0.3), E)
    assert layer.moe.experts.dropout == 0.3
    assert layer.dropout3.p == 0.3
    layer.moe.forward = lambda x: torch.ones_like(x)
    assert 0.2 < (layer._ff_block(torch.randn(50, 50, D)) == 0).float().mean() < 0.4


@pytest.mark.parametrize("kind", [nn.TransformerEncoderLayer, MyEncoderLayer])
def test_copies_pickles_and_state_dicts(kind: type[nn.TransformerEncoderLayer]) -> None:
    model = moefy(encoder(kind), E).eval()
    x = torch.randn(3, 5, D)
    expected = model(x, src_key_padding_mask=MASK)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    other = moefy(encoder(kind), E, init="random").eval()
    other.load_state_dict(model.state_dict())
    twins = (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(file, weights_only=False), other)
    for twin in twins:
        assert isinstance(twin.layers[1], kind)
        assert torch.equal(twin(x, src_key_padding_mask=MASK), expected)
        assert moefy(twin, E) is twin


def test_subclasses() -> None:
    model, x = encoder(MyEncoderLayer).eval(), torch.randn(3, 5, D)
    model.layers[0].train()
    model.layers[1].train()
    expected = model(x)
    assert_same(moefy(model, E)(x), expected)
    with pytest.raises(ValueError, match="besides linear1/linear2"):
        moefy(encoder(OwnFeedForward), E)


@pytest.mark.parametrize("target", ["layers.1", nn.TransformerEncoderLayer])
def test_a_layer_named_by_target_gets_its_feed_forward_part_replaced(target: str | type[nn.Module]) -> None:
    model = encoder()
    x = torch.randn(3, 5, D)
    expected = model(x)
    for _ in range(2):
        moefy(model, E, target=target)
        assert_same(model(x), expected)
    assert isinstance(model.layers[1].moe, fastmoe.MoE)


def test_a_linear_layer_inside_named_by_target() -> None:
    model = encoder().eval()
    x = torch.randn(3, 5, D)
    with torch.no_grad():
        expected = model(x)
        moefy(model, E, target="layers.*.linear1")
        assert_same(model(x), expected)


def test_odd_parts_are_not_mistaken() -> None:
    for name, odd in (
        ("linear1", nn.Sequential(nn.Linear(D, H))),
        ("dropout", nn.AlphaDropout(0.1)),
        ("activation", nn.PReLU()),
    ):
        model = encoder()
        for layer in model.layers:
            setattr(layer, name, odd)
        with pytest.raises(ValueError, match="Looks like one"):
            moefy(model, E)


def test_training_step_and_meta_device() -> None:
    model = moefy(encoder(), E)
    model(torch.randn(8, 5, D)).square().sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    with torch.device("meta"):
        model = encoder()
    assert {p.device.type for p in moefy(model, E).parameters()} == {"meta"}


def test_compiles() -> None:
    model = moefy(encoder(), E).eval()
    x = torch.randn(3, 5, D)
    with torch.no_grad():
        assert_same(torch.compile(model, backend="eager", fullgraph=True)(x), model(x))
