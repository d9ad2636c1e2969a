"""Where there is dropout, with which rate, and that evaluation has none."""

import pytest
import torch
import torch.nn.functional as F
from tiny_models import MAKERS, gpt, large, lstm, random_tokens, xl

B, S, D, H = 2, 5, 8, 16
WHOLE = (B, S, D)
RATES = {"dropout": 0.1, "hidden_dropout": 0.2, "attention_dropout": 0.3}


@pytest.fixture
def sites(monkeypatch):
    """All dropouts that run: the rate, and the shape of what is dropped; "attention" for that of its weights."""
    found = []

    def dropout(x, p=0.5, training=True, inplace=False):
        if training and p:
            found.append((p, tuple(x.shape)))
        return x

    attention = F.scaled_dot_product_attention

    def attend(*args, dropout_p=0.0, **options):
        if dropout_p:
            found.append((dropout_p, "attention"))
        return attention(*args, **options)

    monkeypatch.setattr(F, "dropout", dropout)
    monkeypatch.setattr(F, "scaled_dot_product_attention", attend)
    return found


XL_BLOCK = [(0.3, "attention"), (0.1, WHOLE), (0.2, (B, S, H)), (0.1, WHOLE)]
EXPECTED = {
    "gpt": (gpt(dropout=0.1), [(0.1, WHOLE), *2 * [(0.1, "attention"), (0.1, WHOLE), (0.1, WHOLE)]]),
    "xl": (xl(**RATES), [(0.1, WHOLE), (0.1, (S, D)), *2 * XL_BLOCK, (0.1, WHOLE)]),
    "xl, one rate": (
        xl(dropout=0.1),
        [(0.1, WHOLE), (0.1, (S, D)), *2 * [(0.1, WHOLE), (0.1, (B, S, H)), (0.1, WHOLE)], (0.1, WHOLE)],
    ),
    "xl, pre-norm": (xl(pre_norm=True, **RATES), [(0.1, WHOLE), (0.1, (S, D)), *2 * XL_BLOCK, (0.1, WHOLE)]),
    "lstm": (lstm(dropout=0.1), [(0.1, WHOLE)] * 4),
}


@pytest.mark.parametrize(("model", "expected"), EXPECTED.values(), ids=EXPECTED)
def test_every_site_has_its_rate_in_training_and_none_in_evaluation(model, expected, sites):
    model(random_tokens(B, S))
    assert sites == expected
    sites.clear()
    model.eval()(random_tokens(B, S))
    assert sites == []


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
@pytest.mark.parametrize("experts", [0, 4])
def test_evaluation_is_not_random(make, experts):
    rates = dict.fromkeys(RATES if make is MAKERS["xl"] else ("dropout",), 0.5)
    model, tokens = large(make(num_experts=experts, **rates)), random_tokens(B, S)
    assert torch.equal(model(tokens)[0], model(tokens)[0])
    model.train()
    assert not torch.equal(model(tokens)[0], model(tokens)[0])


def test_the_lstm_s_expert_is_dropped_out_after_the_sigmoid():
    model = large(lstm(dropout=1.0)).train()
    assert not (model(random_tokens(B, S))[0] - model.token_embedding.bias).any()
