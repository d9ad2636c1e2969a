"""Dense models of transformers become MoE models: their function, what they save, and what loads it."""

import copy
import json
import pickle
import subprocess
import sys

import pytest
import torch
import transformers
from dense_models import CLIP_TEXT, CLIP_VISION, COMMON, DENSE, MORE, VOCAB, inputs, llava, make
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
from transformers.models.llama.modeling_llama import LlamaMLP

import fastmoe
from fastmoe.convert import SPLIT_PATTERNS, Absorbed
from fastmoe.integrations.huggingface.model import MoEModel
from fastmoe.routers import ROUTERS

E = 4
ALL = [*DENSE, *(pytest.param(name, marks=pytest.mark.slow) for name in MORE)]


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def logits(model, batch):
    with torch.no_grad():
        output = model(**batch)
    return next(value for value in output.values() if isinstance(value, torch.Tensor))


def moefied(name="gpt2", **options):
    """A MoE model in evaluation whose experts and routers differ from each other."""
    model = fastmoe.moefy(make(name), E, **options)
    with torch.no_grad():
        for layer in fastmoe.moe_layers(model).values():
            for parameter in layer.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


@pytest.mark.parametrize("model_type", ALL)
def test_the_function_stays_and_what_is_saved_is_loaded(model_type, tmp_path):
    dense = make(model_type)
    batch = inputs(model_type)
    before = logits(dense, batch)
    dense.save_pretrained(tmp_path / "dense")
    auto = getattr(transformers, (DENSE | MORE)[model_type].auto)
    model = fastmoe.moefy(auto.from_pretrained(tmp_path / "dense"), E)
    assert type(model).__name__ == f"FastMoE{type(dense).__name__}"
    assert model.config.model_type == f"fastmoe_{dense.config.model_type}"
    assert fastmoe.moe_layers(model)
    after = logits(model, batch)
    assert (after - before).abs().max() < 1e-5 * before.abs().max()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "embed_positions" not in name:  # computed, and not saved, in some
                parameter.add_(torch.randn_like(parameter) * 0.05)
    expected = logits(model, batch)
    assert not torch.allclose(expected, before, atol=1e-3)
    model.save_pretrained(tmp_path / "moe")
    loaded, info = auto.from_pretrained(tmp_path / "moe", output_loading_info=True)
    assert type(loaded) is type(model)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert torch.equal(logits(loaded, batch), expected)


@pytest.mark.slow
def test_every_class_of_the_split_table_is_in_a_model_that_is_tested():
    seen = {type(module).__name__ for name in {**DENSE, **MORE} for module in make(name).modules()}
    listed = {layer for pattern in SPLIT_PATTERNS for layer in pattern.layers}
    assert listed <= seen, f"no tested model has {sorted(listed - seen)}"


def test_dropout_behind_the_activation_of_a_split_block_is_an_obstacle(caplog):
    with pytest.raises(ValueError, match=r"BartEncoderLayer.*dropout 0.1 itself"):
        fastmoe.moefy(make("bart", activation_dropout=0.1), E)


def test_other_heads_and_the_base_load_the_same_weights(tmp_path):
    model = moefied("llama")
    model.save_pretrained(tmp_path)
    base = AutoModel.from_pretrained(tmp_path)
    assert type(base).__name__ == "FastMoELlamaModel"
    batch = inputs("llama")
    with torch.no_grad():
        hidden = model.model(**batch).last_hidden_state
        assert torch.equal(base(**batch).last_hidden_state, hidden)
    head = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert type(head).__name__ == "FastMoELlamaForSequenceClassification"
    with torch.no_grad():
        assert torch.equal(head.model(**batch).last_hidden_state, hidden)
    base.save_pretrained(tmp_path / "base")
    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "base")  # with a head drawn anew
    assert torch.equal(whole.model.layers[0].mlp.experts.w1, model.model.layers[0].mlp.experts.w1)


def test_sharded_safetensors(tmp_path):
    model = moefied()
    model.save_pretrained(tmp_path, max_shard_size="40KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    batch = inputs("gpt2")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path), batch), logits(model, batch))


LOAD = """
import sys
from transformers import AutoModelForCausalLM, GPT2LMHeadModel
for kind, message in ((AutoModelForCausalLM, "fastmoe_gpt2"), (GPT2LMHeadModel, "import fastmoe.integrations")):
    try:
        kind.from_pretrained(sys.argv[1])
    except Exception as error:
        assert message in str(error), error
    else:
        raise SystemExit(f"{kind.__name__} loads it")
import fastmoe.integrations.huggingface
AutoModelForCausalLM.from_pretrained(sys.argv[1])
"""


def test_loading_without_the_import_fails_clearly(tmp_path):
    moefied().save_pretrained(tmp_path)
    ran = subprocess.run([sys.executable, "-c", LOAD, str(tmp_path)], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr


def test_the_dense_class_fails_clearly_with_the_import_too(tmp_path):
    moefied("llama").save_pretrained(tmp_path)
    with pytest.raises(Exception, match="load it by an Auto class"):
        transformers.LlamaForCausalLM.from_pretrained(tmp_path)


def test_a_missing_expert_is_an_error(tmp_path):
    model = moefied()
    state = {name: value for name, value in model.state_dict().items() if "h.1.mlp.experts.w2" not in name}
    model.save_pretrained(tmp_path, state_dict=state)
    with pytest.raises(ValueError, match=r"lacks weights of MoE layers: transformer\.h\.1\.mlp\.experts\.w2"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_a_dense_checkpoint_is_no_moe_checkpoint(tmp_path):
    dense = make("gpt2")
    dense.save_pretrained(tmp_path)
    model = fastmoe.moefy(copy.deepcopy(dense), E)
    with pytest.raises(ValueError, match="lacks weights of MoE layers"):
        type(model).from_pretrained(tmp_path, config=model.config)


ROUTER_OPTIONS = {
    "topk": {"score_function": "sigmoid", "scale": 1.5, "aux_loss_weight": 0.02, "z_loss_weight": 0.001},
    "noisy_topk": {"load_loss_weight": 0.5},
    "switch": {"capacity_factor": 1.5},
    "hash": {"vocab_size": VOCAB},
}


@pytest.mark.parametrize("router", list(ROUTERS))
def test_a_config_holds_every_router(router, tmp_path):
    top_k = 1 if router in ("base", "switch", "hash", "sinkhorn") else 2
    model = fastmoe.moefy(
        make("gpt2"), E, top_k, init="random", router=router, router_options=ROUTER_OPTIONS.get(router)
    )
    batch = inputs("gpt2")
    if router == "hash":
        fastmoe.feed_token_ids(model, model.get_input_embeddings())
    expected = logits(model, batch)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    if router != "random":
        assert torch.equal(logits(loaded, batch), expected)
    layers = (next(iter(fastmoe.moe_layers(m).values())) for m in (model, loaded))
    assert len({str(layer) for layer in layers}) == 1


def test_a_config_holds_shared_experts_every_and_dropouts(tmp_path):
    model = fastmoe.moefy(make("gpt2", resid_pdrop=0.3), E, every=2, shared_d_hidden=16, backend="torch", init="random")
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert str(loaded) == str(model)
    batch = inputs("gpt2")
    assert torch.equal(logits(loaded, batch), logits(model, batch))
    assert loaded.config.n_inner is None
    assert loaded.transformer.h[0].mlp.c_fc.nf == 128


def test_relu_squared_has_a_name(tmp_path):
    model = moefied("nemotron")
    model.save_pretrained(tmp_path)
    batch = inputs("nemotron")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path), batch), logits(model, batch))


def test_what_a_config_cannot_hold_is_said_when_it_is_saved(tmp_path):
    model = fastmoe.moefy(make("gpt2"), E, init="random", expert=lambda: nn.Linear(32, 32))
    logits(model, inputs("gpt2"))
    with pytest.raises(ValueError, match=r"'transformer\.h\.0\.mlp' has experts of its own.*use fastmoe\.save"):
        model.save_pretrained(tmp_path)
    model = fastmoe.moefy(make("gpt2"), E, activation=torch.erf, init="random")
    with pytest.raises(ValueError, match="activation that is under no name"):
        model.save_pretrained(tmp_path)
    assert not (tmp_path / "config.json").exists()


def test_fresh_models_from_a_config():
    config = moefied("llama", init="random").config
    model = AutoModelForCausalLM.from_config(config)
    layer = next(iter(fastmoe.moe_layers(model).values()))
    assert abs(layer.experts.w1.std().item() - config.initializer_range) < 0.002
    assert isinstance(model, MoEModel)
    again = AutoConfig.for_model(**config.to_dict())
    assert again.fastmoe == config.fastmoe
    assert json.loads(again.to_json_string())["intermediate_size"] == 48


def test_the_dense_config_is_left_alone():
    dense = make("llama")
    config = dense.config
    model = fastmoe.moefy(dense, E)
    assert type(config).__name__ == "LlamaConfig"
    assert not hasattr(config, "fastmoe")
    assert all(m.config is model.config for m in model.modules() if hasattr(m, "config"))


def test_a_second_call_changes_nothing(tmp_path):
    model = moefied(every=2)
    cls, config = type(model), model.config
    assert fastmoe.moefy(model, E, every=2) is model
    assert (type(model), model.config) == (cls, config)
    fastmoe.moefy(model, 2 * E, 1)
    assert [group["num_experts"] for group in model.config.fastmoe["layers"]] == [2 * E, E]
    model.save_pretrained(tmp_path)
    batch = inputs("gpt2")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path), batch), logits(model, batch))


@pytest.mark.parametrize("how", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies(how):
    model = moefied("bert")
    batch = inputs("bert")
    copied = how(model)
    assert type(copied) is type(model)
    assert torch.equal(logits(copied, batch), logits(model, batch))


def test_a_model_inside_ones_own_network(tmp_path):
    class Mine(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = make("bert", "AutoModel")
            self.mlp = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 32))

        def forward(self, ids):
            return self.mlp(self.body(input_ids=ids).last_hidden_state)

    model = Mine().eval()
    ids = inputs("bert")["input_ids"]
    expected = model(ids)
    fastmoe.moefy(model, E)
    assert len(fastmoe.moe_layers(model)) == 3
    torch.testing.assert_close(model(ids), expected, rtol=1e-5, atol=1e-5)
    model.body.save_pretrained(tmp_path)
    assert type(AutoModel.from_pretrained(tmp_path)).__name__ == "FastMoEBertModel"


def test_generate():
    model = moefied("llama")
    ids = inputs("llama")["input_ids"]
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    expected = model.generate(ids, use_cache=False, **options)
    assert expected.shape == (2, ids.shape[1] + 6)
    assert torch.equal(model.generate(ids, **options), expected)
    assert torch.equal(model.generate(ids, cache_implementation="static", **options), expected)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    padded = model.generate(ids, attention_mask=mask, **options)
    alone = model.generate(ids[:1, 3:], **options)
    assert torch.equal(padded[0, 3:], alone[0])


def test_half_precision_and_device_map(tmp_path):
    model = moefied("llama")
    batch = inputs("llama")
    exact = logits(model, batch)
    model.save_pretrained(tmp_path)
    for dtype in (torch.float16, torch.bfloat16):
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype, device_map="cpu")
        assert {p.dtype for p in loaded.parameters()} == {dtype}
        assert (logits(loaded, batch).float() - exact).abs().max() < 0.1 * exact.abs().max()
    assert torch.isfinite(logits(copy.deepcopy(model).half(), batch)).all()


def test_weights_on_disk(tmp_path):
    model = moefied("llama")
    model.save_pretrained(tmp_path / "model")
    batch = inputs("llama")
    device_map = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk"}
    device_map |= {"model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    loaded = AutoModelForCausalLM.from_pretrained(
        tmp_path / "model", device_map=device_map, offload_folder=tmp_path / "offload"
    )
    assert loaded.model.layers[1].mlp.experts.w1.is_meta
    assert torch.equal(logits(loaded, batch), logits(model, batch))


def test_resized_embeddings(tmp_path):
    model = moefied("gpt2")
    model.resize_token_embeddings(VOCAB + 7)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    batch = inputs("gpt2")
    assert logits(loaded, batch).shape[-1] == VOCAB + 7
    assert torch.equal(logits(loaded, batch), logits(model, batch))


def test_parts_that_are_absorbed():
    model = moefied("bert")
    block = model.bert.encoder.layer[0]
    assert isinstance(block.intermediate, fastmoe.MoE)
    assert isinstance(block.output.dense, Absorbed)


COMPOSITES = {
    "clip": (
        lambda: transformers.CLIPModel(
            transformers.CLIPConfig(text_config=CLIP_TEXT, vision_config=CLIP_VISION, projection_dim=16)
        ),
        lambda: {"input_ids": torch.randint(3, 90, (2, 7)), "pixel_values": torch.randn(2, 3, 8, 8)},
    ),
    "llava": (llava, lambda: {"input_ids": torch.randint(5, 90, (2, 7))}),
    "encoder_decoder": (
        lambda: transformers.EncoderDecoderModel(encoder=make("bert", "AutoModel"), decoder=decoder()),
        lambda: {"input_ids": torch.randint(5, 90, (2, 7)), "decoder_input_ids": torch.randint(5, 90, (2, 4))},
    ),
}


def decoder():
    config = transformers.BertConfig(**COMMON, is_decoder=True, add_cross_attention=True)
    return transformers.BertLMHeadModel(config)


@pytest.mark.parametrize("name", COMPOSITES)
def test_models_of_several_models(name, tmp_path):
    build, batch = COMPOSITES[name][0](), COMPOSITES[name][1]()
    model = build.eval()
    before = logits(model, batch)
    fastmoe.moefy(model, E)
    assert type(model).__name__.startswith("FastMoE")
    assert (logits(model, batch) - before).abs().max() < 1e-5 * before.abs().max()
    with torch.no_grad():
        for layer in fastmoe.moe_layers(model).values():
            layer.experts.w1.add_(torch.randn_like(layer.experts.w1))
    expected = logits(model, batch)
    model.save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path) if name == "clip" else type(model).from_pretrained(tmp_path)
    assert list(fastmoe.moe_layers(loaded)) == list(fastmoe.moe_layers(model))
    assert torch.equal(logits(loaded, batch), expected)
    state = {key: value for key, value in model.state_dict().items() if not key.endswith("experts.w2")}
    model.save_pretrained(tmp_path / "less", state_dict=state)
    with pytest.raises(ValueError, match="lacks weights of MoE layers"):
        type(model).from_pretrained(tmp_path / "less")


def test_a_part_can_be_saved_by_itself(tmp_path):
    model = llava()
    fastmoe.moefy(model, E, target="*language_model*mlp")
    model.model.language_model.save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path)
    assert type(loaded).__name__ == "FastMoELlamaModel"
    for got, expected in zip(loaded.parameters(), model.model.language_model.parameters(), strict=True):
        assert torch.equal(got, expected)


def test_converting_a_part_and_then_the_whole(tmp_path):
    model = make("t5")
    fastmoe.moefy(model, E, target="encoder.*DenseReluDense")
    fastmoe.moefy(model, E, target="decoder.*DenseReluDense")
    assert type(model).__name__ == "FastMoET5ForConditionalGeneration"
    model.save_pretrained(tmp_path / "t5")
    loaded = transformers.AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "t5")
    batch = inputs("t5")
    assert torch.equal(logits(loaded, batch), logits(model, batch))
    model = make("llama")
    fastmoe.moefy(model.model, E)
    fastmoe.moefy(model, E)
    model.save_pretrained(tmp_path / "llama")
    assert len(fastmoe.moe_layers(AutoModelForCausalLM.from_pretrained(tmp_path / "llama"))) == 2


class WithHead(transformers.LlamaForCausalLM):
    def __init__(self, config):
        super().__init__(config)
        self.extra = LlamaMLP(config)
        self.post_init()


def test_layers_of_a_head(tmp_path):
    model = fastmoe.moefy(WithHead(make("llama").config).eval(), E)
    assert list(fastmoe.moe_layers(model))[-1] == "extra"
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert torch.equal(loaded.extra.experts.w1, model.extra.experts.w1)
    assert len(fastmoe.moe_layers(AutoModelForCausalLM.from_pretrained(tmp_path))) == 2
    model = make("roberta", "AutoModelForSequenceClassification")
    fastmoe.moefy(model, E, target="*classifier.dense", init="random")
    with pytest.raises(ValueError, match="experts of its own"):
        model.save_pretrained(tmp_path)


@pytest.mark.parametrize("name", ["gpt2", "distilbert", "t5"])
def test_no_dense_class_takes_the_checkpoint(name, tmp_path):
    dense = make(name)
    fastmoe.moefy(copy.deepcopy(dense), E).save_pretrained(tmp_path)
    with pytest.raises(Exception, match="load it by an Auto class"):
        type(dense).from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("name", "options"),
    [("gpt2", {}), ("llama", {"router": "noisy_topk"}), ("llama", {"every": 2})],
)
def test_a_native_model_that_cannot_be_leaves_the_model_as_it_was(name, options):
    model = make(name)
    before, batch = list(model.named_modules()), inputs(name)
    expected = logits(model, batch)
    with pytest.raises(ValueError):
        fastmoe.moefy(model, E, to_native=True, **options)
    assert list(model.named_modules()) == before
    assert type(model).__name__ in ("GPT2LMHeadModel", "LlamaForCausalLM")
    assert torch.equal(logits(model, batch), expected)


class Mine(transformers.LlamaForCausalLM):
    """A class that transformers does not know."""


def test_pickles_of_a_class_of_ones_own():
    model = fastmoe.moefy(Mine(make("llama").config).eval(), E)
    batch = inputs("llama")
    assert torch.equal(logits(pickle.loads(pickle.dumps(model)), batch), logits(model, batch))
    assert type(pickle.loads(pickle.dumps(model.config))) is type(model.config)


def test_a_model_type_of_ones_own(tmp_path):
    class MineConfig(transformers.LlamaConfig):
        model_type = "mine"

    class MineForCausalLM(transformers.LlamaForCausalLM):
        config_class = MineConfig

    AutoConfig.register("mine", MineConfig, exist_ok=True)
    AutoModelForCausalLM.register(MineConfig, MineForCausalLM, exist_ok=True)
    model = fastmoe.moefy(MineForCausalLM(MineConfig(**make("llama").config.to_diff_dict())).eval(), E)
    model.save_pretrained(tmp_path)
    batch = inputs("llama")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded).__name__ == "FastMoEMineForCausalLM"
    assert torch.equal(logits(loaded, batch), logits(model, batch))


def test_other_sizes_are_an_error_too(tmp_path):
    moefied("gpt2").save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    config.fastmoe["layers"][0]["num_experts"] = 2 * E
    with pytest.raises(ValueError, match="lacks weights of MoE layers"):
        AutoModelForCausalLM.from_pretrained(tmp_path, config=config, ignore_mismatched_sizes=True)


def test_weights_of_two_dtypes_are_left_alone():
    model = make("t5").half()
    for module in model.modules():
        if hasattr(module, "wo"):
            module.wo.float()
    with pytest.raises(ValueError, match="several dtypes, float16, float32"):
        fastmoe.moefy(model, E)


def test_no_dense_class_takes_a_part_of_a_checkpoint(tmp_path):
    model = fastmoe.moefy(COMPOSITES["clip"][0](), E)
    model.save_pretrained(tmp_path)
    for dense in (transformers.CLIPModel, transformers.CLIPVisionModel, transformers.CLIPTextModel):
        with pytest.raises(Exception, match="load it by an Auto class"):
            dense.from_pretrained(tmp_path)
    assert AutoConfig.from_pretrained(tmp_path).text_config.intermediate_size == 48


def test_a_dense_model_with_the_same_config_stays_dense():
    student = make("llama")
    both = nn.ModuleDict({"student": student, "teacher": transformers.LlamaForCausalLM(student.config)})
    config = student.config
    fastmoe.moefy(both, E, target="student.*.mlp")
    assert both.student.config.model_type == "fastmoe_llama"
    assert both.teacher.config is config
    assert type(both.teacher).__name__ == "LlamaForCausalLM"


def test_a_failure_on_the_way_leaves_the_model_as_it_was(monkeypatch):
    model = make("t5")
    before = [(module, type(module), dict(vars(module)), dict(module._modules)) for module in model.modules()]

    def fail(model):
        raise KeyboardInterrupt

    monkeypatch.setattr(sys.modules["fastmoe.integrations.huggingface.adopt"], "finish", fail)
    with pytest.raises(KeyboardInterrupt):
        fastmoe.moefy(model, E)
    after = [(module, type(module), dict(vars(module)), dict(module._modules)) for module in model.modules()]
    assert after == before


def test_a_model_on_the_meta_device():
    model = fastmoe.moefy(COMPOSITES["clip"][0](), E)
    with torch.device("meta"):
        empty = type(model)(model.config)
    assert [p.shape for p in empty.parameters()] == [p.shape for p in model.parameters()]
