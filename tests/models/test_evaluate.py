"""Evaluation equals a computation of one prediction at a time."""

import dataclasses
import math

import numpy
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


def test_a_text_may_be_an_array_a_memory_map_or_a_list(tmp_path):
    model = TransformerXL(XL)
    expected = evaluate_nats(model, TEXT, segment=5, streams=3)
    TEXT.numpy().astype("uint16").tofile(tmp_path / "text")
    mapped = numpy.memmap(tmp_path / "text", dtype="uint16", mode="r")
    from_file = torch.from_file(str(tmp_path / "text"), size=24, dtype=torch.uint16)
    for text in (TEXT.tolist(), TEXT.numpy(), mapped, from_file, TEXT.int()):
        assert evaluate_nats(model, text, segment=5, streams=3) == expected


def test_no_more_than_a_segment_is_widened_at_once():
    model, text, widest = TransformerXL(XL), torch.zeros(10_000, dtype=torch.uint8), 0

    class Watched(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal widest
            answer = func(*args, **(kwargs or {}))
            if isinstance(answer, torch.Tensor) and answer.dtype == torch.int64:
                widest = max(widest, answer.numel())
            return answer

    with Watched():
        evaluate_nats(model, text, segment=40, streams=5)
    assert widest < len(text) / 2


@pytest.mark.parametrize(
    ("text", "got"),
    [
        (TEXT.view(2, 12), r"int64 of shape \(2, 12\)"),
        (TEXT[:, None], r"int64 of shape \(24, 1\)"),
        (TEXT[0], r"int64 of shape \(\)"),
        (TEXT + 0.7, r"float32 of shape \(24,\)"),
        (TEXT > 9, r"bool of shape \(24,\)"),
        (TEXT.numpy().astype("float64"), r"float64 of shape \(24,\)"),
        ([1.5, 2.5], r"float32 of shape \(2,\)"),
    ],
)
def test_a_text_is_whole_numbers_in_one_dimension(text, got):
    with pytest.raises(ValueError, match=f"text must be whole numbers in one dimension; got {got}"):
        evaluate_bits_per_byte(TransformerXL(XL), text)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"text_N": TEXT[:2], "streams": 2}, "streams=2 and 2 tokens"),
        ({"text_N": TEXT[:1]}, "streams=1 and 1 tokens"),
        ({"segment": 1.5}, "segment must be a whole number >= 1, got 1.5"),
        ({"segment": 0}, "segment must be a whole number >= 1, got 0"),
        ({"streams": 0}, "streams must be a whole number >= 1, got 0"),
        ({"model": torch.nn.Identity()}, "Identity has no parameters to tell its device: give device"),
    ],
)
def test_what_does_not_fit_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        evaluate_nats(**{"model": LSTMLanguageModel(LSTM), "text_N": TEXT} | options)


@pytest.mark.parametrize("error", [False, True])
def test_every_module_is_in_its_own_mode_afterwards(error):
    model = TransformerXL(XL).train()
    model.blocks[0].eval()
    modes = [module.training for module in model.modules()]
    if error:
        with pytest.raises(IndexError):
            evaluate_nats(model, TEXT + 1000)
    else:
        evaluate_nats(model, TEXT)
    assert [module.training for module in model.modules()] == modes


@pytest.mark.parametrize(
    ("router", "options", "warned"),
    [
        ("expert_choice", {}, True),
        ("topk", {"capacity_factor": 1.0}, True),
        ("topk", {}, False),
        ("topk", {"capacity_factor": 1.0, "eval_capacity_factor": math.inf}, False),
    ],
)
def test_a_router_that_sees_the_future_is_told(router, options, warned, recwarn):
    config = dataclasses.replace(XL, router=router, router_options=options)
    evaluate_nats(TransformerXL(config), TEXT)
    messages = [str(warning.message) for warning in recwarn]
    assert bool(messages) == warned
    assert not warned or "blocks.0.mlp: what" in messages[0]
