"""Sampling, and generation with it."""

import math

import pytest
import torch
from tiny_models import gpt, large, random_tokens

from fastmoe.models.gpt import GPT
from fastmoe.models.sampling import sample

LOGITS = torch.tensor([1.0, 0.2, -0.5, 0.7, -2.0])
PROMPT = random_tokens(2, 3)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
@pytest.mark.parametrize("top_k", [None, 1, 3, 5, 9])
def test_tokens_are_as_frequent_as_the_softmax_of_the_best_says(temperature, top_k):
    expected = (LOGITS / temperature).softmax(0)
    expected[LOGITS.argsort(descending=True)[top_k:] if top_k else []] = 0
    rows = LOGITS.expand(20_000, 5)
    tokens = sample(rows, temperature, top_k, torch.Generator().manual_seed(1))
    found = tokens.flatten().bincount(minlength=5) / len(rows)
    torch.testing.assert_close(found, expected / expected.sum(), rtol=0, atol=4 * math.sqrt(0.25 / len(rows)))
    assert not found[expected == 0].any()


def test_of_equal_logits_no_more_than_top_k_are_drawn():
    tokens = sample(torch.zeros(200, 50), 1.0, 3, None)
    assert tokens.unique().numel() == 3


@pytest.mark.parametrize("temperature", [1e-6, 1e6])
def test_extreme_temperatures_give_numbers(temperature):
    assert 0 <= sample(LOGITS[None] * 1e4, temperature, None, None).item() < 5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        *[({"temperature": bad}, "temperature must be a finite number >= 0") for bad in (-1.0, math.inf, math.nan)],
        ({"temperature": 1e-40}, "temperature must be 0 or at least 1e-06, got 1e-40"),
        *[({"top_k": bad}, f"top_k must be a whole number >= 1, got {bad}") for bad in (0, -1, 1.5)],
        ({"n": -1}, "n must be a whole number >= 0, got -1"),
        ({"tokens_BS": PROMPT[:, :0]}, "S at least 1; got int64 of shape"),
    ],
)
def test_what_does_not_fit_is_refused_and_the_model_stays_in_training(options, message):
    model = gpt()
    with pytest.raises(ValueError, match=message):
        model.generate(**{"tokens_BS": PROMPT, "n": 2} | options)
    assert model.training


def test_generation_is_in_evaluation_mode_without_gradient_and_each_module_keeps_its_own(monkeypatch):
    model, seen = large(gpt(dropout=0.9)), []
    expected = model.generate(PROMPT, 5, temperature=0)
    model.train()
    model.blocks[0].eval()
    modes = [module.training for module in model.modules()]
    forward = GPT.forward

    def watched(self, *args, **options):
        answer = forward(self, *args, **options)
        seen.append((any(module.training for module in self.modules()), answer[0].requires_grad))
        return answer

    monkeypatch.setattr(GPT, "forward", watched)
    assert torch.equal(model.generate(PROMPT, 5, temperature=0), expected)
    assert seen == [(False, False)] * 5
    assert [module.training for module in model.modules()] == modes
    model.eval()
    model.generate(PROMPT, 1)
    assert not model.training


def test_no_token_is_the_prompt_and_a_prompt_may_be_longer_than_the_block():
    model = large(gpt())
    assert torch.equal(model.generate(PROMPT, 0), PROMPT)
    long = random_tokens(1, 40)
    assert torch.equal(model.generate(long, 1, temperature=0)[:, -1], model(long[:, -16:])[0][:, -1].argmax(-1))
