"""transformers' MoE models on our kernels: how it is asked for, odd inputs, and what people do with models."""

import copy

import pytest
import torch
import torch.nn.functional as F
from functorch.compile import make_boxed_func
from helpers import assert_measured, assert_same, gradients
from tiny_families import VOCABULARY, build_experts, families, outputs, randomized
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from transformers import AutoConfig, AutoModelForCausalLM, MixtralConfig
from transformers.activations import ACT2FN
from transformers.integrations.moe import ExpertsInterface

from fastmoe import kernels
from fastmoe.integrations.huggingface import experts as ours

FAMILIES = {str(family): family for family in families()}
SMALL = MixtralConfig(
    vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, num_local_experts=4, max_position_embeddings=64, eos_token_id=None,
)  # fmt: skip
# One of each layout: fused; fused without gate; transposed, interleaved, biases; transposed; a norm after each expert.
# Releases of transformers before the newest have no such Aria and MuseSpark.
LAYOUTS = ["Mixtral", "NemotronH relu", "NemotronH", "GptOss", *(n for n in ("Aria", "MuseSpark") if n in FAMILIES)]
PROMPT = torch.arange(3, 17).reshape(2, 7)
pytestmark = pytest.mark.usefixtures("calls", "one_thread")


@pytest.fixture(autouse=True)
def _compiled_anew():
    torch._dynamo.reset()


def layout(name, implementation="fastmoe"):
    name, _, activation = name.partition(" ")
    module = build_experts(FAMILIES[name])
    if activation:
        module.act_fn = ACT2FN[activation]
    module.config._experts_implementation = implementation
    return module


def mixtral(implementation="fastmoe", **kwargs):
    model = randomized(AutoModelForCausalLM.from_config(SMALL, experts_implementation=implementation, **kwargs))
    return model.eval()


def routed(num_tokens=11, width=32, dtype=torch.float64, num_experts=4):
    ids = torch.rand(num_tokens, num_experts).argsort(1)[:, :2]
    return torch.randn(num_tokens, width, dtype=dtype), ids, torch.rand(num_tokens, 2, dtype=dtype)


def run(module, x, ids, weights, upstream):
    module.zero_grad()
    x, weights = (t.detach().clone().requires_grad_() for t in (x, weights))
    out = module(x, ids, weights)
    out.backward(upstream.to(out.dtype))
    return {"out": out.detach(), "x": x.grad, "weights": weights.grad, **gradients(module)}


def test_register_again_changes_nothing():
    ours.register()
    ours.register()
    assert ExpertsInterface()["fastmoe"] is ours.experts_forward


@pytest.mark.parametrize("asked", ["from_config", "set"])
def test_asked_for_by_name(asked, calls):
    model = mixtral("fastmoe" if asked == "from_config" else "eager")
    if asked == "set":
        outputs(model)
        assert not calls
        model.set_experts_implementation("fastmoe")
    got = outputs(model)
    assert calls == [layer.mlp.experts for layer in model.model.layers]
    model.set_experts_implementation("eager")
    torch.testing.assert_close(got, outputs(model))
    assert len(calls) == 2


def test_saved_and_loaded(tmp_path, calls):
    model = mixtral()
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, experts_implementation="fastmoe").eval()
    assert torch.equal(outputs(loaded), outputs(model))
    assert len(calls) == 4
    assert "fastmoe" not in (tmp_path / "config.json").read_text()
    config = AutoConfig.from_pretrained(tmp_path)
    assert {n: v.shape for n, v in loaded.state_dict().items()} == {
        n: v.shape for n, v in AutoModelForCausalLM.from_config(config).state_dict().items()
    }


@pytest.mark.parametrize(
    ("act_fn", "name"),
    [
        (ACT2FN["silu"], "swiglu"),
        (ACT2FN["swish"], "swiglu"),
        (ACT2FN["gelu"], "geglu"),
        (ACT2FN["gelu_pytorch_tanh"], "geglu_tanh"),
        (ACT2FN["relu"], "reglu"),
        (nn.GELU(), "geglu"),
        (nn.GELU("tanh"), "geglu_tanh"),
        (F.silu, "swiglu"),
        (F.gelu, "geglu"),
        (F.relu, "reglu"),
        (torch.relu, "reglu"),
        (ACT2FN["gelu_python"], None),
        (ACT2FN["gelu_python_tanh"], None),
        (ACT2FN["quick_gelu"], None),
        (ACT2FN["relu2"], None),
        (ACT2FN["tanh"], None),
        (type("Own", (nn.SiLU,), {"forward": lambda self, x: x.sin()})(), None),
        (torch.sin, None),
    ],
    ids=lambda value: value if isinstance(value, str) else getattr(value, "__name__", repr(value)),
)
def test_activations(act_fn, name):
    """Known ones are fused, others are not, and each computes what it does in eager; replaced ones are noticed."""
    module = layout("Mixtral").double()
    assert ours.fused_activation(module) == "swiglu"
    del module.act_fn
    module.act_fn = act_fn
    assert ours.fused_activation(module) == name
    given = *routed(), torch.randn(11, 32, dtype=torch.float64)
    got = run(module, *given)
    module.config._experts_implementation = "eager"
    assert_same(got, run(module, *given))


def test_a_gate_of_its_own_is_used():
    module = layout("Mixtral").double()
    given = routed()
    before = module(*given)
    module._apply_gate = lambda pre: 2 * module.act_fn(pre.chunk(2, -1)[0]) * pre.chunk(2, -1)[1]
    assert ours.fused_activation(module) is None
    torch.testing.assert_close(module(*given), 2 * before)


def test_biases_of_the_usual_layout():
    module = layout("Mixtral").double()
    module.has_bias = True
    module.gate_up_proj_bias = nn.Parameter(torch.randn(4, 96, dtype=torch.float64))
    module.down_proj_bias = nn.Parameter(torch.randn(4, 32, dtype=torch.float64))
    given = *routed(), torch.randn(11, 32, dtype=torch.float64)
    got = run(module, *given)
    module._apply_gate = lambda pre: type(module)._apply_gate(module, pre)  # the same, but not known to be
    assert ours.fused_activation(module) is None
    assert_same(got, run(module, *given))
    x, ids, weights = given[:3]
    pre = torch.einsum("td,tkhd->tkh", x, module.gate_up_proj[ids]) + module.gate_up_proj_bias[ids]
    gate, up = pre.chunk(2, -1)
    out = torch.einsum("tkh,tkdh->tkd", F.silu(gate) * up, module.down_proj[ids]) + module.down_proj_bias[ids]
    torch.testing.assert_close(got["out"], (out * weights.unsqueeze(-1)).sum(1))


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("sentinel", [4, -1])
@pytest.mark.usefixtures("poison")
def test_experts_that_are_not_here(name, sentinel):
    """Such rows are not computed, whatever their token and weight; nothing of them is in any gradient."""
    module = layout(name).double()
    x, ids, weights = routed()
    upstream = torch.randn_like(x)
    absent = torch.rand(ids.shape) < 0.4
    absent[3] = True
    there = torch.where(absent, sentinel, ids)
    got = run(module, x, there, torch.where(absent, 0.7, weights), upstream)
    expected = run(module, x, ids, torch.where(absent, 0.0, weights), upstream)
    expected["weights"] = torch.where(absent, 0.0, expected["weights"])
    tight = {"rtol": 1e-5, "atol": 1e-5} if name == "MuseSpark" else {"rtol": 1e-10, "atol": 1e-12}  # a float32 norm
    torch.testing.assert_close(got, expected, **tight)
    assert not got["out"][3].any()
    x[3] = float("nan")
    got = run(module, x, there, weights.masked_fill(absent, 0), upstream)
    assert not got["x"][3].any()
    torch.testing.assert_close(got, expected, **tight)


@pytest.mark.parametrize("name", LAYOUTS)
def test_no_expert_here_at_all(name):
    module = layout(name)
    x, _, weights = routed(dtype=torch.float32)
    got = run(module, x, torch.full((11, 2), 4), weights, torch.randn_like(x))
    assert all(not value.any() for value in got.values())


def test_an_expert_that_does_not_exist_is_an_error():
    x, ids, weights = routed(dtype=torch.float32)
    with pytest.raises(ValueError, match=r"expert ids must lie in 0\.\.3"):
        layout("Mixtral")(x, ids + 2, weights)


@pytest.mark.parametrize("name", LAYOUTS)
def test_no_token(name):
    module = layout(name)
    x, ids, weights = routed(0, dtype=torch.float32)
    got = run(module, x, ids, weights, torch.randn_like(x))
    assert got["out"].shape == (0, 32)
    assert all(not value.any() for value in got.values())


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize(
    ("hidden", "weight"), [("float32", "float32"), ("float32", "bfloat16"), ("bfloat16", "float32")]
)
def test_autocast(name, hidden, weight):
    """Also experts of bfloat16 among float32: as accurate as eager, and in the dtype of the tokens."""
    module = layout(name).bfloat16().double()
    x, ids, weights = (t if t.dtype == torch.int64 else t.bfloat16().double() for t in routed())
    upstream = torch.randn(11, 32).bfloat16().double()
    exact = run(module, x, ids, weights, upstream)
    module = module.to(getattr(torch, weight))
    results = {}
    for implementation in ("fastmoe", "eager"):
        module.config._experts_implementation = implementation
        with torch.autocast("cpu", torch.bfloat16):
            results[implementation] = run(module, x.to(getattr(torch, hidden)), ids, weights.float(), upstream)
    assert results["fastmoe"]["out"].dtype == getattr(torch, hidden)
    assert_measured(results["fastmoe"], results["eager"], exact)


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize(("hidden", "weight"), [("float32", "bfloat16"), ("bfloat16", "float32")])
def test_mixed_dtypes_without_autocast(name, hidden, weight):
    """As transformers' grouped_mm: computed in the experts' dtype, given back in the tokens'."""
    module = layout(name).to(getattr(torch, weight))
    x, ids, weights = routed(dtype=torch.float32)
    got = run(module, x.to(getattr(torch, hidden)), ids, weights, torch.randn_like(x))
    assert got["out"].dtype == got["x"].dtype == getattr(torch, hidden)
    assert got["weights"].dtype == torch.float32
    truth = module.double()(x.double(), ids, weights.double()).detach()
    torch.testing.assert_close(got["out"].double(), truth, rtol=0, atol=float(0.03 * truth.abs().max()))


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_experts_compile_without_a_graph_break(name, dtype):
    """And into the same kernels; another activation is noticed."""
    module = layout(name).to(dtype)
    graphs = []
    keep = aot_autograd(fw_compiler=lambda graph, inputs: graphs.append(graph) or make_boxed_func(graph))
    compiled = torch.compile(module, fullgraph=True, backend=keep)
    x, ids, weights = routed(dtype=dtype)
    ids[2] = 4
    upstream = torch.randn_like(x)
    for fused in (name in ("Mixtral", "NemotronH relu"), False):
        graphs.clear()
        got = run(compiled, x, ids, weights, upstream)
        assert kernels_in(graphs[0]) == ["plan", *(["expert_mlp"] if fused else ["grouped_mm", "grouped_mm"])]
        expected = run(module, x, ids, weights, upstream)
        for value, truth in zip(got.values(), expected.values(), strict=True):
            torch.testing.assert_close(value, truth)
        if name == "GptOss":
            break  # it has none
        module.act_fn = nn.Tanh()


def kernels_in(graph):
    return [node.target.name().split("::")[1] for node in graph.graph.nodes if "fastmoe" in str(node.target)]


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_a_whole_model_compiles_without_a_graph_break(backend):
    model = mixtral()
    forward = lambda ids: model(input_ids=ids, use_cache=False).logits  # noqa: E731
    compiled = torch.compile(forward, fullgraph=True, backend=backend)
    for ids in (PROMPT,) if backend == "aot_eager" else (PROMPT, PROMPT[:1, :5]):
        expected, got = model(input_ids=ids, use_cache=False).logits, compiled(ids)
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    got.square().sum().backward()
    grads = gradients(model)
    model.zero_grad()
    expected.square().sum().backward()
    for name, value in gradients(model).items():
        torch.testing.assert_close(grads[name], value, rtol=0, atol=float(1e-4 * value.abs().max()))


def generate(model, **kwargs):
    return model.generate(PROMPT, attention_mask=torch.ones_like(PROMPT), max_new_tokens=6, do_sample=False, **kwargs)


WAYS = [(how, dtype) for how in ("cache", "no cache", "static cache") for dtype in (torch.float32, torch.bfloat16)]


@pytest.mark.parametrize(("how", "dtype"), [*WAYS, ("compiled", torch.float32)])
def test_generate(how, dtype, calls):
    kwargs = {"use_cache": False} if how == "no cache" else {}
    if how in ("static cache", "compiled"):
        kwargs = {"cache_implementation": "static"}
    model = mixtral("eager").to(dtype)
    expected = generate(model)
    assert len(set(expected[:, PROMPT.shape[1] :].flatten().tolist())) > 2
    model.set_experts_implementation("fastmoe")
    if how == "compiled":
        model.forward = torch.compile(model.forward, fullgraph=True, backend="aot_eager")
    got = generate(model, **kwargs)
    assert torch.equal(got, expected)
    assert calls or how == "compiled"


def test_bf16_model_is_as_accurate_as_eager():
    exact_model = mixtral("eager").bfloat16().double()
    model = copy.deepcopy(exact_model).bfloat16()
    exact = {"out": outputs(exact_model).detach()}
    results = []
    for implementation in ("fastmoe", "eager"):
        model.set_experts_implementation(implementation)
        results.append({"out": outputs(model).detach()})
    assert_measured(*results, exact)


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("frozen", ["experts", "router", "input", "all"])
def test_frozen_parts(name, frozen):
    module = layout(name).double()
    x, ids, weights = routed()
    upstream = torch.randn_like(x)
    expected = run(module, x, ids, weights, upstream)
    module.zero_grad()
    module.requires_grad_(frozen not in ("experts", "all"))
    x.requires_grad_(frozen not in ("input", "all"))
    weights.requires_grad_(frozen not in ("router", "all"))
    out = module(x, ids, weights)
    torch.testing.assert_close(out, expected["out"])
    if frozen == "all":
        assert not out.requires_grad
        return
    out.backward(upstream)
    for key, leaf in {"x": x, "weights": weights, **dict(module.named_parameters())}.items():
        assert (leaf.grad is not None) == leaf.requires_grad
        if leaf.requires_grad:
            torch.testing.assert_close(leaf.grad, expected[key])


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing(use_reentrant):
    model = mixtral().train()

    def step():
        model.zero_grad()
        outputs(model).square().sum().backward()
        return gradients(model)

    expected = step()
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    if use_reentrant:
        model.enable_input_require_grads()
    got = step()
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value)


def test_a_copy_trains_alone():
    model = mixtral()
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.model.layers[0].mlp.experts.gate_up_proj.add_(0.1)
    with torch.no_grad():
        assert not torch.equal(outputs(twin), outputs(model))
    assert torch.equal(outputs(copy.deepcopy(model)), outputs(model))


def test_fused_weights_are_not_copied(monkeypatch):
    seen = []
    real = kernels.expert_mlp

    def watched(x, tokens, weights, plan, w1, b1, w2, b2, **kwargs):
        seen.append((w1, w2))
        return real(x, tokens, weights, plan, w1, b1, w2, b2, **kwargs)

    monkeypatch.setattr(kernels, "expert_mlp", watched)
    module = layout("Mixtral")
    module(*routed(dtype=torch.float32))
    ((w1, w2),) = seen
    assert w1 is module.gate_up_proj
    assert w2 is module.down_proj
