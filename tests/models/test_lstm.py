"""The LSTM language model."""

import math

import pytest
import torch

import fastmoe
from fastmoe.models import LSTMConfig, LSTMLanguageModel, language_model_step

TINY = {"d_model": 16, "d_hidden": 32}
EXPERTS = {"num_experts": 8, "top_k": 2}
FORMS = [{}, EXPERTS, EXPERTS | {"layers_before": 2, "cutoffs": (100,)}]


def make(**options):
    return LSTMLanguageModel(LSTMConfig(**TINY | options))


def random_tokens(*shape):
    return torch.randint(256, shape, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_segments_equal_the_whole_text_and_nothing_looks_ahead(form):
    model, tokens, state, parts = make(**form).double().eval(), random_tokens(2, 9), None, []
    for segment in tokens.split([4, 1, 4], dim=1):
        logits, _, state = model(segment, None, state)
        parts.append(logits)
    whole, changed = model(tokens)[0], model(tokens.index_fill(1, torch.tensor([8]), 7))[0]
    torch.testing.assert_close(torch.cat(parts, dim=1), whole)
    torch.testing.assert_close(changed[:, :8], whole[:, :8], rtol=0, atol=1e-12)
    assert state.shape == (2 * len(model.lstms), 2, 16)
    assert not state.requires_grad


@pytest.mark.parametrize("form", [{}, EXPERTS, {"layers_before": 2}, {"layers_after": 2}], ids=str)
def test_layers_are_those_of_the_paper(form):
    model, tokens = make(**form).double().eval(), random_tokens(2, 5)
    x = model.token_embedding(tokens)
    for layer, lstm in enumerate(model.lstms):
        if layer == form.get("layers_before", 1):
            x = x + model.mlp(x).sigmoid()
        x = x + lstm(x)[0]
    torch.testing.assert_close(model(tokens)[0], x @ model.token_embedding.weight.T)


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_every_parameter_learns(form):
    model, tokens = make(**form), random_tokens(4, 6)
    loss, state = language_model_step(model, tokens, tokens.flip(0))
    uniform = math.log(256) if not model.config.cutoffs else math.log(101) + math.log(156) / 2  # in two steps
    assert loss.item() == pytest.approx(uniform, rel=0.2)
    language_model_step(model, tokens, tokens.flip(0), state)[0].backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_noisy_gating_starts_at_zero_also_after_moefy():
    model = fastmoe.moefy(make(), num_experts=4, router="noisy_topk", init="random", d_hidden=16)
    model.init_weights()
    moe = fastmoe.moe_layers(model)["mlp"]
    assert not moe.router.proj.weight.any()
    assert not moe.experts.b1.any()
    assert moe.experts.w1.std().item() == pytest.approx(0.02, rel=0.1)
    assert moe.experts.activation == "relu"
