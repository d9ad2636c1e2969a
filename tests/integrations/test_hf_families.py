"""Every MoE family of the installed transformers: on our kernels it computes what it computes by itself."""

import copy

import pytest
import torch
from helpers import assert_measured, assert_same
from tiny_families import build_experts, build_model, families, outputs

from fastmoe.integrations.huggingface import experts as ours

NAMED = {"Mixtral", "Qwen2Moe", "Qwen3Moe", "DeepseekV3", "Olmoe", "Glm4Moe", "GptOss", "NemotronH", "Aria"}
UNBUILT_MODELS: dict[str, str] = {}
"""Families of which no whole model is built here, each with the reason. Of all of them the experts are."""

FAMILIES = {str(family): family for family in families()}
EACH = pytest.mark.parametrize("family", [pytest.param(f, id=n) for n, f in FAMILIES.items()])
UNFUSED = {
    "Aria", "Beam", "DeepseekV4", "Glm5NextText", "GptOss", "HYV4", "HYV4VL", "Inkling2", "Inkling2Loop",
    "MiniMaxM3VL", "MuseSpark", "NemotronH", "OpenAIPrivacyFilter",
}  # fmt: skip
IN_FLOAT32 = {"Beam", "Inkling2", "Inkling2Loop", "MuseSpark", "OpenAIPrivacyFilter"}
"""Those whose eager experts compute in float32, some step at least, whatever their dtype."""
pytestmark = pytest.mark.usefixtures("calls", "one_thread")


def routed(case, num_experts, num_tokens=13, top_k=2):
    if case == "one expert":
        return torch.full((num_tokens, 1), num_experts - 1)
    return torch.rand(num_tokens, num_experts).argsort(1)[:, :top_k]


def run_experts(experts, implementation, x, ids, weights, upstream):
    """The output and every gradient by name."""
    experts.config._experts_implementation = implementation
    experts.zero_grad()
    x, weights = (t.detach().clone().requires_grad_() for t in (x, weights))
    out = experts(x, ids, weights)
    out.backward(upstream)
    return {"out": out.detach(), "x": x.grad, "weights": weights.grad} | {
        name: parameter.grad for name, parameter in experts.named_parameters()
    }


def assert_close(got, expected, tolerance):
    """Every tensor, up to a part of its largest number."""
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        assert value.isfinite().all(), name
        torch.testing.assert_close(got[name], value, rtol=0, atol=float(tolerance * value.abs().max()), msg=name)


@pytest.mark.parametrize("case", ["random", "one expert"])
@EACH
def test_experts_are_as_accurate_as_eager(family, case):
    experts = build_experts(family)
    width = experts.down_proj.shape[1 if not experts.is_transposed else 2]
    ids = routed(case, len(experts.down_proj))
    x, upstream = torch.randn(2, len(ids), width, dtype=torch.float64)
    weights = torch.rand(ids.shape, dtype=torch.float64)
    x, upstream, weights = (t.bfloat16().double() for t in (x, upstream, weights))
    experts = experts.bfloat16().double()
    exact = run_experts(experts, "eager", x, ids, weights, upstream)
    assert all(t.isfinite().all() and t.any() for t in exact.values())
    got = run_experts(experts, "fastmoe", x, ids, weights, upstream)
    if str(family) in IN_FLOAT32:
        assert_close(got, exact, 2e-6)
    else:
        assert_same(got, exact)
    for dtype in (torch.float32, torch.bfloat16):
        experts = copy.deepcopy(experts).to(dtype)
        given = x.to(dtype), ids, weights.to(dtype), upstream.to(dtype)
        plain = "grouped_mm" if str(family) == "OpenAIPrivacyFilter" else "eager"  # whose eager is all in float32
        assert_measured(run_experts(experts, "fastmoe", *given), run_experts(experts, plain, *given), exact)


def test_those_with_the_usual_layout_and_gate_are_fused():
    unfused = {name for name, family in FAMILIES.items() if ours.fused_activation(build_experts(family)) is None}
    assert unfused == UNFUSED & FAMILIES.keys()


def test_named_families_are_there():
    named = NAMED if "MuseSpark" in FAMILIES else NAMED - {"Aria"}  # which older releases compute in its own way
    assert FAMILIES.keys() >= named | UNBUILT_MODELS.keys()


def run_model(model, implementation):
    model.set_experts_implementation(implementation)
    model.zero_grad()
    out = outputs(model)
    torch.manual_seed(1)
    out.backward(torch.randn_like(out))
    return {"out": out.detach()} | {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


@EACH
def test_a_whole_model_computes_what_eager_does(family, calls):
    if str(family) in UNBUILT_MODELS:
        with pytest.raises(LookupError):
            build_model(family)
        return
    model = build_model(family)
    expected = run_model(model, "eager")
    assert not calls
    got = run_model(model, "fastmoe")
    assert {type(m).__name__ for m in calls} == {family.name}
    assert sum(".experts." in name for name in got) >= 2 * len(calls)
    assert_close(got, expected, 5e-5)
