"""Evaluation equals a computation of one prediction at a time."""

import math

import pytest
import torch

from fastmoe.models import (
    GPT,
    GPTConfig,
    LSTMConfig,
    LSTMLanguageModel,
    TransformerXL,
    TransformerXLConfig,
    evaluate_bits_per_byte,
    evaluate_nats,
)

XL = TransformerXLConfig(n_layer=2, n_head=2, d_model=8, d_hidden=16, memory_length=4, num_experts=4)
LSTM = LSTMConfig(d_model=8, d_hidden=16, num_experts=4)
TEXT = torch.randint(256, (24,), generator=torch.Generator().manual_seed(1))


def bits(logits_SV, targets_S):
    picked = logits_SV.double().log_softmax(-1)[torch.arange(len(targets_S)), targets_S]
    return -picked / math.log(2)


def large(model):
    for parameter in model.parameters():
        parameter.data.normal_(std=0.4)
    return model.double()


@pytest.mark.parametrize("model", [TransformerXL(XL), LSTMLanguageModel(LSTM)], ids=["xl", "lstm"])
def test_every_byte_counts_once_with_all_that_came_before(model):
    model, options = large(model), {"memory_length": 100} if isinstance(model, TransformerXL) else {}
    model.eval()
    one_by_one = [bits(model(TEXT[None, :n])[0][0, -1:], TEXT[n : n + 1]) for n in range(1, 24)]
    expected = torch.cat(one_by_one).mean().item()
    model.train()
    for segment in (1, 5, 23, 100):
        got = evaluate_bits_per_byte(model, TEXT.to(torch.uint8), segment=segment, **options)
        assert got == pytest.approx(expected, rel=1e-12)
    assert model.training


def test_streams_are_parts_of_the_text_and_the_rest_follows_the_last():
    model = large(TransformerXL(XL)).eval()
    parts = [(0, 4), (4, 8), (8, 12), (12, 16), (16, 23)]  # 23 predictions in 5 streams of 4, and 3 more
    sums = [
        bits(model(TEXT[None, a:b], memory_length=9, same_length=True)[0][0], TEXT[a + 1 : b + 1]).sum()
        for a, b in parts
    ]
    got = evaluate_bits_per_byte(model, TEXT, segment=3, streams=5, memory_length=9, same_length=True)
    assert got == pytest.approx(float(sum(sums).detach()) / 23, rel=1e-12)


def test_a_longer_memory_and_one_length_do_not_depend_on_the_segment():
    model = large(TransformerXL(XL))
    options = {"memory_length": 7, "same_length": True}
    results = [evaluate_nats(model, TEXT, segment=segment, **options) for segment in (1, 2, 11, 23)]
    assert results == pytest.approx([results[0]] * 4, rel=1e-12)
    assert results[0] != pytest.approx(evaluate_nats(model, TEXT, segment=1), rel=1e-3)


def test_a_model_without_memory_sees_its_segment_alone():
    model = large(GPT(GPTConfig(block_size=8, n_layer=1, n_head=2, d_model=8))).eval()
    parts = [bits(model(TEXT[None, a : a + 8])[0][0, : 23 - a], TEXT[a + 1 : a + 9]) for a in (0, 8)]
    parts.append(bits(model(TEXT[None, 16:23])[0][0], TEXT[17:]))
    expected = torch.cat(parts).mean().item()
    assert evaluate_bits_per_byte(model, TEXT, segment=8) == pytest.approx(expected, rel=1e-6)


def test_too_short_a_text_is_refused():
    with pytest.raises(ValueError, match="streams=2 and 2 tokens"):
        evaluate_nats(LSTMLanguageModel(LSTM), TEXT[:2], streams=2)
