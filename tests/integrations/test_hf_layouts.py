"""State dicts of MoE models between layouts: every element where it belongs, and nothing lost in silence."""

from itertools import product

import pytest
import torch

import fastmoe
from fastmoe.integrations.huggingface.layouts import LAYOUTS, convert_state_dict

transformers = pytest.importorskip("transformers")

E, D, H = 12, 5, 3  # more than ten experts: expert 10 must not come after expert 1
BLOCKS = ("model.layers.0.mlp.", "model.layers.11.mlp.")
GATED = sorted(name for name, layout in LAYOUTS.items() if layout.gated is not False)
PLAIN = sorted(name for name, layout in LAYOUTS.items() if not layout.gated)
BIASED = ("fastmoe", "gpt-oss")


def numbered(gated=True, bias=False, dtype=torch.float32):
    """A model's state as fastmoe lays it out, in which no two elements have the same bits."""
    width = 2 * H if gated else H
    shapes = {"router.proj.weight": (E, D), "experts.w1": (E, width, D), "experts.w2": (E, D, H)}
    if bias:
        shapes |= {"experts.b1": (E, width), "experts.b2": (E, D)}
    shapes = {block + name: shape for block in BLOCKS for name, shape in shapes.items()}
    shapes |= {"model.embed_tokens.weight": (7, D), "model.layers.1.mlp.up_proj.weight": (H, D)}
    state, start = {}, 1
    for name, shape in shapes.items():
        count = torch.Size(shape).numel()
        integers = torch.arange(start, start + count, dtype=torch.int32 if dtype == torch.float32 else torch.int16)
        state[name], start = integers.view(dtype).view(shape), start + count
    return state


def bits(state):
    return {name: tensor.view(torch.int16).tolist() for name, tensor in state.items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("first", "second", "gated", "bias"),
    [(*pair, True, False) for pair in product(GATED, GATED)]
    + [(*pair, False, False) for pair in product(PLAIN, PLAIN)]
    + [(*pair, True, True) for pair in product(BIASED, BIASED)],
)
def test_a_round_trip_between_any_two_layouts_gives_the_same_bits(first, second, gated, bias, dtype):
    start = numbered(gated, bias, dtype)
    in_first = convert_state_dict(start, "fastmoe", first)
    in_second = convert_state_dict(in_first, first, second)
    assert all(tensor.is_contiguous() for tensor in in_second.values())
    assert bits(convert_state_dict(in_second, second, first)) == bits(in_first)
    assert bits(convert_state_dict(in_second, second, "fastmoe")) == bits(start)


def halves(block, number):
    """Gate, up and down of one expert, from a state that `numbered` made."""
    return block["experts.w1"][number, :H], block["experts.w1"][number, H:], block["experts.w2"][number]


EXPECTED = {
    "mixtral-v4": lambda t, e: (t[f"experts.{e}.w1.weight"], t[f"experts.{e}.w3.weight"], t[f"experts.{e}.w2.weight"]),
    "per-expert": lambda t, e: tuple(t[f"experts.{e}.{name}_proj.weight"] for name in ("gate", "up", "down")),
    "fused": lambda t, e: (*t["experts.gate_up_proj"][e].chunk(2), t["experts.down_proj"][e]),
    "fused-transposed": lambda t, e: (
        *t["experts.gate_up_proj"][e].T.chunk(2),
        t["experts.down_proj"][e].T,
    ),
    "gpt-oss": lambda t, e: (
        t["experts.gate_up_proj"][e][:, ::2].T,
        t["experts.gate_up_proj"][e][:, 1::2].T,
        t["experts.down_proj"][e].T,
    ),
}


@pytest.mark.parametrize("target", EXPECTED)
def test_each_value_lies_where_the_layout_says(target):
    start = numbered()
    result = convert_state_dict(start, "fastmoe", target)
    for prefix in BLOCKS:
        inside, before = (
            {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}
            for state in (result, start)
        )
        for number in range(E):
            for got, expected in zip(EXPECTED[target](inside, number), halves(before, number), strict=True):
                assert torch.equal(got, expected)


def test_the_biases_of_gpt_oss_take_turns_as_its_weights_do():
    start = numbered(bias=True)
    result = convert_state_dict(start, "fastmoe", "gpt-oss")
    for prefix in BLOCKS:
        gate_EH, up_EH = start[prefix + "experts.b1"].chunk(2, dim=1)
        bias = result[prefix + "experts.gate_up_proj_bias"]
        assert torch.equal(bias[:, ::2], gate_EH)
        assert torch.equal(bias[:, 1::2], up_EH)
        assert torch.equal(result[prefix + "experts.down_proj_bias"], start[prefix + "experts.b2"])


def test_experts_without_a_gate_keep_their_names_apart():
    start = numbered(gated=False)
    result = convert_state_dict(start, "fastmoe", "per-expert-plain")
    for number in range(E):
        name = f"{BLOCKS[1]}experts.{number}.up_proj.weight"
        assert torch.equal(result[name], start[BLOCKS[1] + "experts.w1"][number])


def test_blocks_and_routers_are_renamed_and_the_rest_passes():
    start = numbered() | {BLOCKS[0] + "shared.w1.weight": torch.ones(2)}
    result = convert_state_dict(start, "fastmoe", "mixtral-v4", block="block_sparse_moe", router="router.weight")
    assert result["model.layers.11.block_sparse_moe.router.weight"] is start[BLOCKS[1] + "router.proj.weight"]
    assert "model.layers.0.block_sparse_moe.shared.w1.weight" in result
    for name in ("model.embed_tokens.weight", "model.layers.1.mlp.up_proj.weight"):
        assert result[name] is start[name]
    back = convert_state_dict(result, "mixtral-v4", "fastmoe", block="mlp")
    assert bits(back) == bits(start)


def test_a_single_block_needs_no_prefix():
    layer = fastmoe.MoE(D, E, d_hidden=H, activation="swiglu", bias=False)
    result = convert_state_dict(layer.state_dict(), "fastmoe", "per-expert")
    assert "experts.11.gate_proj.weight" in result
    layer.load_state_dict(convert_state_dict(result, "per-expert", "fastmoe"))
    del result["experts.3.up_proj.weight"]
    with pytest.raises(
        ValueError, match=r"^from 'per-expert' to 'fastmoe': .* 12 experts.*experts\.3\.up_proj\.weight"
    ):
        convert_state_dict(result, "per-expert", "fastmoe")


def test_equal_layouts_and_slices_share_memory_and_the_state_is_left_alone():
    start = numbered()
    names = list(start)
    w1 = start[BLOCKS[0] + "experts.w1"]
    for target, name in (("fused", "gate_up_proj"), ("mixtral-v4", "3.w3.weight"), ("per-expert", "3.up_proj.weight")):
        result = convert_state_dict(start, "fastmoe", target)
        assert result[f"{BLOCKS[0]}experts.{name}"].untyped_storage().data_ptr() == w1.untyped_storage().data_ptr()
    assert list(start) == names


def test_a_checkpoint_of_slices_can_be_saved(tmp_path):
    from safetensors.torch import load_file, save_file

    apart = convert_state_dict(numbered(), "fastmoe", "mixtral-v4")
    save_file(apart, tmp_path / "model.safetensors")
    assert bits(load_file(tmp_path / "model.safetensors")) == bits(apart)


def lose(*names):
    return lambda state: [state.pop(BLOCKS[1] + name) for name in names]


def put(name, *shape, dtype=torch.float32):
    return lambda state: state.update({BLOCKS[1] + name: torch.zeros(*shape, dtype=dtype)})


W = "experts.{}.w{}.weight"
THREE = [W.format(number, matrix) for number in (2, 5, 11) for matrix in (1, 2, 3)]
ALL = ("experts.gate_up_proj", "experts.down_proj")


@pytest.mark.parametrize(
    ("source", "damage", "target", "words"),
    [
        ("mixtral-v4", lose(*THREE), "fastmoe", r"12 experts.*experts\.2\.w1.*experts\.11\.w1.*3 more"),
        ("mixtral-v4", lose(W.format(11, 3)), "fused", r"missing: experts\.11\.w3\.weight"),
        ("per-expert", lose("experts.0.gate_proj.weight"), "fastmoe", r"missing: experts\.0\.gate_proj"),
        ("fused", lose("experts.down_proj"), "fastmoe", r"'model\.layers\.11\.mlp'.*missing: experts\.down_proj"),
        ("fused", lose(*ALL), "fastmoe", r"11\.mlp' has a router, gate\.weight, and no"),
        ("fused", lose("gate.weight"), "fastmoe", "expected one router's matrix"),
        ("mixtral-v4", put(W.format(12, 1), H, D), "fastmoe", r"no place.*experts\.12\.w1\.weight"),
        ("mixtral-v4", put(W.format(4, 1), H + 1, D), "fastmoe", r"alike: experts\.0\.w1.*\(3, 5\).*4\.w1.*\(4, 5\)"),
        ("mixtral-v4", put(W.format(4, 3), D, H), "fastmoe", r"alike"),
        ("mixtral-v4", put(W.format(4, 2), D, H, dtype=torch.float16), "fastmoe", "alike.*float16"),
        ("fused", put("experts.gate_up_proj", E, D, 2 * H), "fastmoe", r"w1 must be \(12, 6, 5\).*got \(12, 5, 6\)"),
        ("fused", put("experts.gate_up_proj", E, H, D), "fastmoe", r"w1 must be"),
        ("gpt-oss", put("experts.gate_up_proj", E, D, 7), "fastmoe", r"w1 must be"),
        ("fused", put("experts.down_proj", E, D), "fastmoe", "3 dimensions"),
        ("fused", put("gate.weight", E, D + 1), "fastmoe", r"w1 must be \(12, 6, 6\)"),
        ("fastmoe", put("experts.b1", E, 2 * H), "gpt-oss", r"missing: experts\.b2"),
        ("fused", put("experts.gate_up_proj_scales", E), "fastmoe", "no place.*gate_up_proj_scales"),
        ("gpt-oss", put("router.bias", E), "fastmoe", r"no place.*router\.bias"),
        ("per-expert", put("gate.e_score_correction_bias", E), "fastmoe", "no place.*e_score_correction_bias"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_an_error(source, damage, target, words):
    state = convert_state_dict(numbered(), "fastmoe", source)
    damage(state)
    with pytest.raises(ValueError, match=words):
        convert_state_dict(state, source, target)


def test_a_routers_bias_passes_where_the_router_keeps_its_name():
    state = convert_state_dict(numbered(), "fastmoe", "per-expert")
    put("gate.e_score_correction_bias", E)(state)
    assert BLOCKS[1] + "gate.e_score_correction_bias" in convert_state_dict(state, "per-expert", "fused")


@pytest.mark.parametrize("target", sorted(set(LAYOUTS) - set(BIASED)))
def test_biases_need_a_layout_that_has_them(target):
    state = numbered(gated=LAYOUTS[target].gated is not False, bias=True)
    with pytest.raises(ValueError, match=r"no place for the experts' biases experts\.b1, experts\.b2"):
        convert_state_dict(state, "fastmoe", target)


@pytest.mark.parametrize(
    ("gated", "source", "target", "words"),
    [
        (True, "fastmo", "fused", r"unknown source 'fastmo'\. Did you mean 'fastmoe'"),
        (True, "fastmoe", "fussed", r"unknown target 'fussed'\. Did you mean 'fused'"),
        (
            True,
            "mixtral-v4",
            "fastmoe",
            r"no experts in the layout 'mixtral-v4': no name ends in experts\.{}\.w1\.weight",
        ),
        (False, "fastmoe", "fused", "the experts have no gate"),
        (True, "fastmoe", "fused-plain", "the experts have a gate"),
    ],
)
def test_layouts_that_do_not_fit_are_errors(gated, source, target, words):
    with pytest.raises(ValueError, match=words):
        convert_state_dict(numbered(gated), source, target)


def test_no_tensor_takes_the_name_of_another():
    state = numbered() | {BLOCKS[0] + "gate.weight": torch.zeros(E, D)}
    with pytest.raises(ValueError, match="expected one router's matrix"):
        convert_state_dict(state, "fastmoe", "fused")
    state = numbered() | {"model.layers.0.moe.gate.weight": torch.zeros(E, D)}
    with pytest.raises(ValueError, match=r"two tensors by the name model\.layers\.0\.moe\.gate\.weight"):
        convert_state_dict(state, "fastmoe", "fused", block="moe")


SMALL = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 32,
}
MIXTRAL = {"intermediate_size": 24, "num_local_experts": 4, "num_experts_per_tok": 2}
QWEN = {"moe_intermediate_size": 24, "num_experts": 4, "num_experts_per_tok": 2, "norm_topk_prob": True, "head_dim": 8}
MODELS = {"mixtral": (MIXTRAL, "mixtral-v4"), "qwen3_moe": (QWEN, "per-expert")}


@pytest.fixture(params=MODELS)
def moe_model(request):
    options, on_disk = MODELS[request.param]
    config = transformers.AutoConfig.for_model(request.param, **SMALL, **options)
    return transformers.AutoModelForCausalLM.from_config(config).eval(), on_disk


def block_as_fastmoe(state, source):
    converted = convert_state_dict(state, source, "fastmoe")
    prefix = next(name for name in converted if name.endswith("router.proj.weight")).removesuffix("router.proj.weight")
    layer = fastmoe.MoE(16, 4, d_hidden=24, activation="swiglu", bias=False).eval()
    layer.load_state_dict({n.removeprefix(prefix): t for n, t in converted.items() if n.startswith(prefix)})
    return layer


def test_fastmoe_computes_what_a_transformers_block_computes(moe_model, tmp_path):
    from safetensors.torch import load_file

    model, on_disk = moe_model
    x = torch.randn(2, 9, 16)
    expected = model.model.layers[0].mlp(x)
    torch.testing.assert_close(block_as_fastmoe(model.state_dict(), "fused")(x), expected)
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    torch.testing.assert_close(block_as_fastmoe(saved, on_disk)(x), expected)


def test_a_transformers_block_loads_what_fastmoe_trained(moe_model):
    model, _ = moe_model
    layer = fastmoe.MoE(16, 4, d_hidden=24, activation="swiglu", bias=False).eval()
    model.model.layers[0].mlp.load_state_dict(convert_state_dict(layer.state_dict(), "fastmoe", "fused"))
    x = torch.randn(2, 9, 16)
    torch.testing.assert_close(model.model.layers[0].mlp(x), layer(x))


def experts_of_transformers(name):
    """A module of the family whose experts lie in the layout `name`."""
    small = {
        "hidden_size": D,
        "intermediate_size": H,
        "moe_intermediate_size": H,
        "head_dim": 4,
        "num_attention_heads": 1,
    }
    if name == "fused-transposed":
        from transformers.models.aria.modeling_aria import AriaExperts

        return AriaExperts(transformers.AriaTextConfig(**small, moe_num_experts=E))
    if name == "fused-plain":
        from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHExperts

        return NemotronHExperts(transformers.NemotronHConfig(**small, n_routed_experts=E, mlp_hidden_act="relu"))
    from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts

    experts = GptOssExperts(transformers.GptOssConfig(**small, num_local_experts=E))
    experts.alpha, experts.limit = 1.0, float("inf")  # it computes silu(gate) * (up + 1)
    return experts


@pytest.mark.parametrize(
    ("name", "activation"), [("fused-transposed", "swiglu"), ("fused-plain", "relu"), ("gpt-oss", "swiglu")]
)
def test_the_experts_of_aria_and_gpt_oss_and_nemotron_compute_the_same(name, activation):
    bias = name == "gpt-oss"
    layer = fastmoe.MoE(D, E, 2, d_hidden=H, activation=activation, bias=bias).eval()
    experts = experts_of_transformers(name)
    converted = convert_state_dict(layer.state_dict(), "fastmoe", name)
    experts.load_state_dict({n.removeprefix("experts."): t for n, t in converted.items() if n.startswith("experts.")})
    if bias:
        with torch.no_grad():
            layer.experts.b1[:, H:] += 1
    x_TD = torch.randn(4 * E, D)
    weights_TK, ids_TK = layer.router.proj(x_TD).softmax(dim=1).topk(2)
    weights_TK = weights_TK / weights_TK.sum(dim=1, keepdim=True)
    torch.testing.assert_close(experts(x_TD, ids_TK, weights_TK), layer(x_TD))
