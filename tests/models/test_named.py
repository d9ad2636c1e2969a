"""The table of named configurations."""

import pytest
import torch

import fastmoe
from fastmoe.models import NAMED, TransformerXL, build, language_model_step, named_config

TWINS = [("txl-enwik8-base", "-moe64"), ("gpt-small", "-moe96"), ("txl-tiny", "-moe"), ("gpt-tiny", "-moe"),
         ("lstm-tiny", "-moe")]  # fmt: skip


def counted(name, **changes):
    return fastmoe.summary(build(name, device="meta", **changes))


def router_parameters(name):
    layers = fastmoe.moe_layers(build(name, device="meta"))
    return sum(p.numel() for layer in layers.values() for p in layer.router.parameters())


XL_BASE = {"n_layer": 12, "n_head": 8, "d_model": 512, "d_hidden": 2048, "memory_length": 512, "dropout": 0.1}
GPT_SMALL = {
    "vocab_size": 50257,
    "block_size": 1024,
    "n_layer": 12,
    "n_head": 12,
    "d_model": 768,
    "bias": True,
    "d_hidden": None,
}
LSTM_BASE = {"d_model": 512, "d_hidden": 2048, "layers_before": 1, "layers_after": 1, "dropout": 0.1}
PUBLISHED = {
    "txl-enwik8-base": XL_BASE | {"num_experts": 0, "pre_norm": False, "attention_dropout": 0.0, "vocab_size": 256},
    "txl-enwik8-base-moe64": XL_BASE | {"num_experts": 64, "top_k": 2, "router": "topk", "expert_hidden": None},
    "gpt-small": GPT_SMALL | {"num_experts": 0, "positions": "learned", "norm": "layer", "tied": True},
    "gpt-small-moe96": GPT_SMALL | {"num_experts": 96, "top_k": 2, "router": "topk", "expert_hidden": None},
    "lstm-dense": LSTM_BASE | {"num_experts": 0},
    "lstm-moe512": LSTM_BASE | {"num_experts": 512, "top_k": 2, "router": "noisy_topk", "expert_hidden": None},
    "switch-c": {
        "n_layer": 30, "d_model": 2080, "d_hidden": 6144, "n_head": 32, "d_head": 64, "vocab_size": 32128,
        "num_experts": 2048, "top_k": 1, "moe_every": 1, "router": "switch", "norm": "rms",
    },
    "gshard-600b": {
        "n_layer": 36, "d_model": 1024, "d_hidden": 8192, "n_head": 16, "d_head": 128, "vocab_size": 64000,
        "num_experts": 2048, "top_k": 2, "expert_hidden": 8192, "moe_every": 2, "router": "gshard",
    },
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_sizes_are_the_published_ones(name):
    config = NAMED[name]
    assert {field: getattr(config, field) for field in PUBLISHED[name]} == PUBLISHED[name]


def test_all_that_is_not_tiny_is_published():
    assert {name for name in NAMED if "tiny" not in name} == PUBLISHED.keys()


@pytest.mark.parametrize("name", NAMED)
def test_every_name_builds_without_memory(name):
    model = build(name, device="meta")
    assert all(parameter.is_meta for parameter in model.parameters())
    assert bool(fastmoe.moe_layers(model)) == bool(NAMED[name].num_experts)


def test_transformer_xl_with_64_experts_has_20_times_the_parameters_and_the_same_active_ones():
    dense, moe = counted("txl-enwik8-base"), counted("txl-enwik8-base-moe64")
    assert round(dense.total_params / 1e6) == 41  # table 2 of the paper
    assert 19.5 < moe.total_params / dense.total_params < 20.5
    assert moe.active_params / dense.active_params < 1.01
    experts = fastmoe.moe_layers(build("txl-enwik8-base-moe64", device="meta"))["blocks.11.mlp"].experts
    assert (experts.w1.shape, experts.w2.shape, experts.activation) == ((64, 1024, 512), (64, 512, 1024), "relu")


@pytest.mark.parametrize("twins", TWINS, ids=lambda twins: twins[0])
def test_twins_differ_in_router_and_biases_alone(twins):
    dense, moe = counted(twins[0]), counted("".join(twins))
    layers = fastmoe.moe_layers(build("".join(twins), device="meta")).values()
    second_output_bias = sum(layer.d_model for layer in layers if layer.experts.b2 is not None)
    assert moe.active_params - dense.active_params == router_parameters("".join(twins)) + second_output_bias
    assert counted("".join(twins), num_experts=0) == dense


def test_gpt_small_is_of_the_size_of_gpt_2_and_its_twin_has_12_layers_of_96_experts():
    assert counted("gpt-small").total_params == 124_439_808
    layers = counted("gpt-small-moe96").layers
    assert [(layer.num_experts, layer.top_k) for layer in layers] == [(96, 2)] * 12


def test_the_lstm_has_512_experts_of_a_million_parameters():
    (layer,) = counted("lstm-moe512").layers
    assert (layer.num_experts, layer.top_k) == (512, 2)
    experts = build("lstm-moe512", device="meta").mlp.experts
    assert experts.parameters_per_expert() == [2 * 512 * 1024 + 1024 + 512] * 512


def test_switch_c_has_1571_billion_parameters():
    found = counted("switch-c")
    cross_attention = 15 * 4 * 2080 * 32 * 64
    assert round(found.total_params / 1e9) == round((found.total_params + cross_attention) / 1e9) == 1571
    assert [(layer.num_experts, layer.top_k) for layer in found.layers] == [(2048, 1)] * 30


def test_gshard_has_600_billion_parameters():
    found = counted("gshard-600b")
    assert sum(layer.num_experts for layer in found.layers) == 18 * 2048
    assert found.total_params == pytest.approx(600e9, rel=0.04)


@pytest.mark.parametrize("name", ["txl-tiny-moe", "gpt-tiny-moe", "lstm-tiny-moe"])
def test_tiny_models_step_and_remember(name):
    model, tokens = build(name), torch.randint(256, (2, 9))
    loss, state = language_model_step(model, tokens[:, :-1], tokens[:, 1:])
    loss, _ = language_model_step(model, tokens[:, :-1], tokens[:, 1:], state)
    loss.backward()
    assert (state is None) == name.startswith("gpt")
    assert loss.isfinite()


def test_unknown_names_are_refused_with_the_nearest():
    with pytest.raises(ValueError, match=r"unknown model 'gpt-smal'\. Did you mean 'gpt-small'"):
        build("gpt-smal")
    with pytest.raises(ValueError, match="Did you mean 'd_model'"):
        named_config("gpt-tiny", dmodel=3)
    assert named_config("gpt-tiny", vocab_size=7).vocab_size == 7


SMALL = {"vocab_size": 50, "n_layer": 1, "n_head": 2, "d_head": 4, "d_model": 8, "d_hidden": 16, "num_experts": 4}


@pytest.mark.parametrize("name", ["switch-c", "gshard-600b"])
def test_a_large_model_with_small_sizes_builds_and_one_of_its_own_size_does_not(name):
    changes = SMALL | {"moe_every": 1, "expert_hidden": None}
    assert build(name, **changes, device="cpu").token_embedding.weight.device.type == "cpu"
    for still_large in ({}, {"num_experts": 2048}, {"n_layer": 20}):
        with pytest.raises(ValueError, match="build it with device='meta', got 'cpu'"):
            build(name, device="cpu", **still_large)


def test_the_size_counts_whatever_the_name():
    with pytest.raises(ValueError, match=r"at most 100,000,000,000 on a device.*got None"):
        build("gpt-tiny", d_model=400_000)
    with torch.device("meta"):
        assert build("gpt-tiny", d_model=400_000).head.weight.is_meta


def test_a_model_is_built_on_its_device_and_counting_it_draws_nothing():
    torch.manual_seed(3)
    model = build("txl-tiny-moe", device="cpu")
    assert {parameter.device.type for parameter in model.parameters()} == {"cpu"}
    torch.manual_seed(3)
    again = TransformerXL(named_config("txl-tiny-moe"))
    assert all(map(torch.equal, model.state_dict().values(), again.state_dict().values()))
