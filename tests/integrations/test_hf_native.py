"""Models with `fastmoe.MoE` layers as transformers' own MoE models: the same function, and nothing lost in silence."""

import logging
import subprocess
import sys

import pytest
import torch
from torch import nn

import fastmoe
from fastmoe.convert import moefy

transformers = pytest.importorskip("transformers")

from fastmoe.integrations.huggingface import adopt, to_native  # noqa: E402
from fastmoe.integrations.huggingface.native_family import FAMILIES  # noqa: E402

VOCAB = 61
SMALL = {
    "hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": VOCAB, "max_position_embeddings": 64, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
TOLERANCE = {torch.float32: 2e-5, torch.float64: 2e-6}  # transformers rounds norms and routing weights to float32


def dense(model_type, head="CausalLM", dtype=torch.float32, **config):
    config = transformers.AutoConfig.for_model(model_type, **SMALL | config)
    auto = transformers.AutoModel if head is None else getattr(transformers, f"AutoModelFor{head}")
    return auto.from_config(config, dtype=dtype)


def diverge(model):
    """Two steps of training on a random target from random weights, so that no two experts and no two layers agree."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(2):
        model.train()(tokens())[0].square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def converted(model_type="llama", num_experts=4, *, head="CausalLM", dtype=torch.float32, config=None, **options):
    return diverge(moefy(dense(model_type, head, dtype, **config or {}), num_experts, **options))


def tokens():
    return torch.randint(3, VOCAB, (2, 17), generator=torch.Generator().manual_seed(1))


def native_of(model):
    native = to_native(model)
    if model.dtype == torch.float64:
        native.set_experts_implementation("eager")  # the default one knows no float64
    return native


def answer(model, **inputs):
    """The logits, or whatever a head without logits gives first."""
    output = model(tokens(), **inputs)
    return output.logits if "logits" in output else output[0]


@torch.no_grad()
def assert_same_outputs(native, model):
    attended = torch.ones(2, 17, dtype=torch.int64)
    attended[1, 12:] = 0
    for inputs in ({}, {"attention_mask": attended}):
        got, expected = answer(native, **inputs), answer(model, **inputs)
        torch.testing.assert_close(got, expected, rtol=0, atol=TOLERANCE[model.dtype] * expected.abs().max().item())


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}


def by_native_names(gradients, family):
    inside = {"experts.w1": "experts.gate_up_proj", "experts.w2": "experts.down_proj"}
    inside["router.proj.weight"] = family.router
    result = {}
    for name, gradient in gradients.items():
        block, dot, rest = name.partition(".mlp.")
        result[f"{block}.{family.block}.{inside[rest]}" if dot and rest in inside else name] = gradient
    return result


def assert_same_gradients(got, expected, family):
    expected = by_native_names(expected, family)
    assert expected.keys() <= got.keys()
    for name, gradient in expected.items():
        assert gradient.abs().max() > 0, name
        torch.testing.assert_close(got[name], gradient, rtol=0, atol=1e-4 * gradient.abs().max().item(), msg=name)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("model_type", FAMILIES)
def test_outputs_are_those_of_the_model(model_type, dtype):
    model = converted(model_type, dtype=dtype)
    w1 = model.model.layers[0].mlp.experts.w1
    assert all((w1[0] - other).abs().max() > 1e-2 for other in w1[1:])
    native = native_of(model)
    assert type(native).__name__ == f"{FAMILIES[model_type].native}ForCausalLM"
    assert native.dtype == native.config.dtype == dtype
    assert not [name for name, module in native.named_modules() if isinstance(module, fastmoe.MoE)]
    assert_same_outputs(native, model)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_gradients_are_those_of_the_model(model_type):
    model = converted(model_type, router_options={"aux_loss_weight": 0}).train()
    native = native_of(model)
    assert native.training
    assert not native.config.output_router_logits
    upstream = torch.randn(2, 17, VOCAB)
    expected = gradients(model, (model(tokens()).logits * upstream).sum())
    got = gradients(native, (native(tokens()).logits * upstream).sum())
    assert_same_gradients(got, expected, FAMILIES[model_type])


@pytest.mark.parametrize(("num_experts", "top_k"), [(4, 2), (6, 3)])
def test_the_balance_loss_of_one_layer_is_the_same(num_experts, top_k):
    options = {"top_k": top_k, "router_options": {"aux_loss_weight": 0.7}}
    model = converted("llama", num_experts, config={"num_hidden_layers": 1}, **options).train()
    native = native_of(model)
    expected = gradients(model, model(tokens(), labels=tokens()).loss)
    output = native(tokens(), labels=tokens())
    assert_same_gradients(gradients(native, output.loss), expected, FAMILIES["llama"])
    with fastmoe.collect_aux_losses(model) as losses:
        model(tokens())
    torch.testing.assert_close(native.config.router_aux_loss_coef * output.aux_loss, losses.total())


def test_the_balance_loss_of_all_layers_weighs_as_much_where_they_are_even():
    model = converted("qwen3", 4, every=2, config={"num_hidden_layers": 6}, router_options={"aux_loss_weight": 0.5})
    native = native_of(model)
    for layer in native.model.layers[1::2]:
        layer.mlp.gate.weight.requires_grad_(False).zero_()
    for layer in model.model.layers[1::2]:
        layer.mlp.router.proj.weight.requires_grad_(False).zero_()
    with fastmoe.collect_aux_losses(model) as losses:
        model(tokens())
    torch.testing.assert_close(native.config.router_aux_loss_coef * native(tokens()).aux_loss, losses.total())


LOAD = """
import sys, torch
from pathlib import Path
from transformers import AutoModelForCausalLM
for folder in sorted(Path(sys.argv[1]).iterdir()):
    wanted = torch.load(folder / "wanted.pt")
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    assert type(model).__name__ == wanted["class"], type(model)
    assert torch.equal(model(wanted["tokens"]).logits, wanted["logits"]), folder
assert not [name for name in sys.modules if name.partition(".")[0] == "fastmoe"]
print("all equal")
"""


def test_a_process_without_fastmoe_loads_what_was_saved(tmp_path):
    variants = {name: {} for name in FAMILIES}
    variants |= {
        "qwen2": {"shared_d_hidden": 8},
        "qwen3": {"every": 2},
        "mistral": {"config": {"tie_word_embeddings": True}},
    }
    for model_type, options in variants.items():
        native = native_of(converted(model_type, **options))
        native.save_pretrained(tmp_path / model_type)
        with torch.no_grad():
            wanted = {"class": type(native).__name__, "tokens": tokens(), "logits": native(tokens()).logits}
        torch.save(wanted, tmp_path / model_type / "wanted.pt")
    command = [sys.executable, "-c", LOAD, str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=200, cwd=tmp_path)
    assert result.stdout.strip() == "all equal", result.stderr[-2000:]


@pytest.mark.parametrize("head", [None, "SequenceClassification", "TokenClassification", "QuestionAnswering"])
@pytest.mark.parametrize("model_type", ["llama", "qwen2"])
def test_other_heads(model_type, head):
    model = converted(model_type, head=head, config={"num_labels": 3})
    native = native_of(model)
    suffix = "Model" if head is None else f"For{head}"
    assert type(native).__name__ == FAMILIES[model_type].native + suffix
    assert native.config.num_labels == 3
    assert not native.config.output_router_logits
    assert_same_outputs(native, model)


def test_a_head_that_the_family_lacks_is_an_error():
    model = moefy(dense("olmo2", "SequenceClassification"), 4)
    with pytest.raises(
        ValueError, match="has Olmo2ForSequenceClassification, and no FlexOlmoForSequenceClassification"
    ):
        to_native(model)


ROPE = {
    "linear": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4},
    "dynamic": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "rope_theta": 1e4},
    "llama3": {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16, "rope_theta": 5e5,
    },
}  # fmt: skip
SLIDING = {"use_sliding_window": True, "sliding_window": 4}
SETTINGS = [
    *(("llama", {"rope_parameters": rope}) for rope in ROPE.values()),
    ("llama", {"head_dim": 16}),
    ("llama", {"rms_norm_eps": 0.1, "pretraining_tp": 2}),
    ("llama", {"hidden_act": "gelu_pytorch_tanh"}),
    ("mistral", {"sliding_window": 4}),
    ("qwen2", {"head_dim": 16}),
    ("qwen2", SLIDING | {"max_window_layers": 1}),
    ("qwen3", SLIDING | {"max_window_layers": 0}),
    ("qwen3", {"head_dim": 16, "attention_bias": True}),
    ("olmo2", {"attention_bias": True}),
    ("granite", {"logits_scaling": 2.0, "embedding_multiplier": 3.0}),
    ("granite", {"residual_multiplier": 0.5, "attention_multiplier": 0.3}),
    ("granite_swa", {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]}),
]  # fmt: skip


@pytest.mark.parametrize(("model_type", "config"), SETTINGS, ids=lambda value: value if isinstance(value, str) else "")
def test_settings_of_the_dense_model_stay(model_type, config):
    model = converted(model_type, config=config)
    assert_same_outputs(native_of(model), model)


def test_tied_weights_stay_tied_and_count_once():
    model = converted("llama", config={"tie_word_embeddings": True})
    native = native_of(model)
    assert native.lm_head.weight is native.model.embed_tokens.weight
    assert sum(p.numel() for p in native.parameters()) == sum(p.numel() for p in model.parameters())
    assert_same_outputs(native, model)


def test_weights_are_shared_and_frozen_ones_stay_frozen():
    model = converted("llama")
    model.model.layers[1].mlp.experts.w2.requires_grad_(False)
    model.model.embed_tokens.weight.requires_grad_(False)
    native = native_of(model)
    frozen = [name for name, parameter in native.named_parameters() if not parameter.requires_grad]
    assert frozen == ["model.embed_tokens.weight", "model.layers.1.mlp.experts.down_proj"]
    assert model.lm_head.weight.requires_grad
    ours = {parameter.data_ptr() for parameter in model.parameters()}
    assert {parameter.data_ptr() for parameter in native.parameters()} == ours


def test_generation_settings_and_texts_are_the_same():
    model = converted("llama")
    model.generation_config.max_new_tokens = 7
    native = native_of(model)
    prompt, mask = tokens()[:, :5], torch.ones(2, 5, dtype=torch.int64)
    got = native.generate(prompt, attention_mask=mask, do_sample=False)
    assert got.shape[1] > 5
    assert torch.equal(got, model.generate(prompt, attention_mask=mask, do_sample=False))
    assert native.generation_config is not model.generation_config


def test_bfloat16_and_attention_implementation_are_kept():
    model = converted("llama", dtype=torch.bfloat16)
    model.set_attn_implementation("eager")
    native = native_of(model)
    assert {parameter.dtype for parameter in native.parameters()} == {torch.bfloat16}
    assert native.config._attn_implementation == "eager"
    assert native.model.rotary_emb.inv_freq.dtype == torch.float32
    got, expected = native(tokens()).logits, model(tokens()).logits
    assert (got - expected).abs().mean() < 0.02 * expected.abs().mean()


@pytest.mark.parametrize("model_type", ["qwen2", "qwen3"])
def test_layers_left_dense_stay_dense(model_type):
    model = converted(model_type, every=2, config={"num_hidden_layers": 5})
    native = native_of(model)
    assert native.config.mlp_only_layers == [0, 2, 4]
    assert native.config.intermediate_size == 24
    assert_same_outputs(native, model)


def test_a_shared_expert_becomes_that_of_qwen2():
    model = converted("qwen2", shared_d_hidden=8)
    assert model.model.layers[0].mlp.shared.w2.weight.abs().max() > 0.01
    native = native_of(model)
    assert native.config.shared_expert_intermediate_size == 8
    assert_same_outputs(native, model)


def test_an_empty_shared_expert_stays_empty_in_training():
    native = native_of(converted("qwen2")).train()
    native(tokens(), labels=tokens()).loss.backward()
    shared = [p for name, p in native.named_parameters() if "shared_expert" in name]
    assert len(shared) == 2 * 4
    assert not any(p.any() or p.grad.any() for p in shared)


@pytest.mark.parametrize("options", [{"normalize": False}, {"score_after": True}, {"capacity_factor": float("inf")}])
def test_routers_that_the_family_has(options):
    model = converted("qwen3", 4, init="random", router_options=options)
    native = native_of(model)
    assert native.config.norm_topk_prob == ("normalize" not in options)
    assert_same_outputs(native, model)


def test_one_expert_per_token_is_converted_with_a_warning(caplog):
    model = converted("llama", top_k=1)
    with caplog.at_level(logging.WARNING, logger="fastmoe"):
        native = native_of(model)
    assert "router of Mixtral learns from its balance loss alone" in caplog.text
    assert_same_outputs(native, model)


class OtherMoE(fastmoe.MoE):
    pass


def edit(change):
    """A LLaMA whose second layer is unlike the first."""

    def make():
        model = moefy(dense("llama"), 4)
        change(model.model.layers[1])
        return model

    return make


def llama(config=None, **options):
    return lambda: moefy(dense("llama", **config or {}), 4, **options)


def swap(num_experts=4, top_k=2, **options):
    options = {"d_hidden": 24, "activation": "swiglu", "bias": False} | options
    return edit(lambda layer: setattr(layer, "mlp", fastmoe.MoE(32, num_experts, top_k, **options)))


def router(**options):
    return swap(router_options=options)


def extra(module):
    module.register_parameter("extra", nn.Parameter(torch.ones(1)))


GPT2 = {"n_embd": 32, "n_head": 4, "n_layer": 2}
ONE_OF_TWO = SLIDING | {"layer_types": ["sliding_attention", "full_attention"]}
SECOND = r"layer 'model\.layers\.1\.mlp'"


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: dense("llama"), "holds no fastmoe.MoE layer"),
        (lambda: nn.Linear(2, 2), "a model of transformers' own classes, got Linear"),
        (lambda: moefy(dense("gpt2", **GPT2), 4), "fits 'gpt2'.*llama -> Mixtral"),
        (swap(num_experts=6), f"{SECOND} has num_experts=6, layer 'model.layers.0.mlp' has 4"),
        (swap(top_k=3), f"{SECOND} has top_k=3"),
        (swap(d_hidden=25), f"{SECOND} has d_hidden=25"),
        (swap(activation="geglu"), f"{SECOND} has hidden_act=gelu"),
        (router(aux_loss_weight=0.5), f"{SECOND} has aux_loss_weight=0.5"),
        (router(normalize=False), f"{SECOND} has normalized=False"),
        (swap(shared_d_hidden=8), f"{SECOND} has shared_d_hidden=8"),
        (swap(bias=True), f"{SECOND}: its experts have biases"),
        (swap(dropout=0.1), f"{SECOND}: its experts have a dropout of 0.1"),
        (swap(activation="silu"), f"{SECOND}: its experts' activation is 'silu'"),
        (swap(router="switch", top_k=1), f"{SECOND}: its router is SwitchRouter"),
        (router(score_function="sigmoid"), "router scores by sigmoid"),
        (router(scale=2.0), "scales the weights by 2.0"),
        (router(num_groups=2, top_groups=1), "groups"),
        (router(capacity_factor=1.5), "capacity_factor=1.5.*drops tokens"),
        (router(eval_capacity_factor=2.0), "eval_capacity_factor=2.0"),
        (router(z_loss_weight=0.1), "z_loss_weight=0.1"),
        (edit(lambda layer: layer.mlp.router.double()), "differ in dtype"),
        (edit(lambda layer: setattr(layer, "mlp", OtherMoE(32, 4))), "it is a OtherMoE"),
        (edit(lambda layer: setattr(layer.self_attn, "o_proj", OtherMoE(32, 4))), r"o_proj. does not stand"),
        (edit(lambda layer: extra(layer.mlp)), r"differ.*layers\.1\.mlp\.extra"),
        (edit(extra), r"differ.*layers\.1\.extra"),
        (edit(lambda layer: layer.self_attn.add_module("noise", nn.Dropout())), "noise' is of class Dropout"),
        (edit(lambda layer: setattr(layer, "input_layernorm", nn.RMSNorm(32))), "class RMSNorm, expected LlamaRMSNorm"),
        (edit(lambda layer: layer.input_layernorm.to("meta")), r"several devices \(cpu, meta\)"),
        (llama(expert=lambda: nn.Linear(32, 32), init="random"), "modules of one's own"),
        (llama(every=2), r"layers \[0\] are dense; every layer of a Mixtral"),
        (llama(shared_d_hidden=8), "Mixtral has none"),
        (llama(init="random", router_options={"normalize": False}), r"do not sum to 1.*those of Mixtral do"),
        (llama({"attention_bias": True}), "attention_bias=True of the Llama config: Mixtral knows no such setting"),
        (llama({"mlp_bias": True}), "experts have biases"),
        (lambda: moefy(dense("qwen3", **ONE_OF_TWO), 4), "one kind of attention"),
        (lambda: moefy(dense("qwen3"), 4, every=2, init="random", activation="geglu"), "the experts 'gelu'"),
    ],
)  # fmt: skip
def test_what_transformers_cannot_express_is_an_error(make, words):
    with pytest.raises(ValueError, match=words):
        to_native(make())


def test_a_class_of_ones_own_is_refused():
    class Mine(transformers.LlamaForCausalLM):
        pass

    model = moefy(dense("llama"), 4)
    model.__class__ = Mine
    with pytest.raises(ValueError, match="transformers' own classes, got Mine"):
        to_native(model)


@pytest.mark.parametrize("head", ["CausalLM", "QuestionAnswering"])
def test_a_model_with_a_model_type_of_fastmoe_is_converted(head, tmp_path):
    model = adopt(converted("llama", head=head))
    assert type(model).__name__ == f"FastMoELlamaFor{head}"
    native = native_of(model)
    assert type(native.config) is transformers.MixtralConfig
    assert "fastmoe" not in native.config.to_dict()
    assert_same_outputs(native, model)
    model.save_pretrained(tmp_path)
    loaded = getattr(transformers, f"AutoModelFor{head}").from_pretrained(tmp_path)
    assert_same_outputs(native_of(loaded.eval()), model)
