"""Consecutive segments: what a step sees, and evaluation with memory."""

import pytest
import torch
from tiny_run import LSTM, change, make_trainer

from fastmoe.train.batches import Share, Windows
from fastmoe.train.streams import Streams

DATA = torch.arange(1000).remainder(251).to(torch.uint8)


def streams(**given):
    return Streams(**{"block_size": 16, "batch_size": 6, "eval_sequences": 0, "seed": 7, **given})


def test_a_segment_follows_that_of_the_step_before_and_goes_around():
    size = 1000
    whole = torch.cat([streams().draw(DATA, step)[0] for step in range(80)], dim=1)
    assert torch.equal(streams().draw(DATA, 3)[1][:, -1], streams().draw(DATA, 4)[0][:, 0])
    for row in whole:
        assert torch.equal(row[:size].sort().values, DATA.long().sort().values)
        assert torch.equal(row[size:], row[: whole.shape[1] - size])
    assert not torch.equal(streams(seed=8).draw(DATA, 0)[0], streams().draw(DATA, 0)[0])


@pytest.mark.parametrize(("micro_steps", "world_size"), [(1, 2), (3, 1), (3, 2)])
def test_shares_make_up_the_whole_batch(micro_steps, world_size):
    shares = [Share(m, micro_steps, r, world_size) for m in range(micro_steps) for r in range(world_size)]
    drawn = torch.cat([streams().draw(DATA, 5, share)[0] for share in shares])
    assert torch.equal(drawn, streams().draw(DATA, 5)[0])


def counted_targets(batches, shares):
    found = []
    for share in shares:
        for batch in batches.held_out(DATA, share):
            assert torch.equal(batch.tokens_BS[:, 1:], batch.targets_BS[:, :-1])
            found += batch.targets_BS[: batch.counted].flatten().tolist()
    return sorted(found)


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("eval_sequences", [0, 10_000])
def test_the_whole_text_is_evaluated_each_byte_once(world_size, eval_sequences):
    shares = [Share(rank=rank, world_size=world_size) for rank in range(world_size)]
    assert counted_targets(streams(eval_sequences=eval_sequences), shares) == sorted(DATA[1:].tolist())
    batches = [list(streams(eval_sequences=eval_sequences).held_out(DATA, share)) for share in shares]
    assert len({len(each) for each in batches}) == 1


def test_a_part_of_the_text_is_spread_over_it():
    data = torch.arange(16 * 32 * 4 + 1).remainder(251).to(torch.uint8)
    batches = list(streams(eval_sequences=64).held_out(data))
    assert [batch.fresh for batch in batches] == [True, False]
    assert batches[0].tokens_BS[:3, 0].tolist() == [data[i] for i in (0, 64, 128)]
    assert sum(batch.targets_BS.numel() for batch in batches) == 64 * 16


@pytest.mark.parametrize("eval_sequences", [0, 7])
def test_the_batch_of_training_has_no_part_in_evaluation(eval_sequences):
    shapes = set()
    for batch_size in (1, 6, 256):
        given = streams(eval_sequences=eval_sequences, batch_size=batch_size).held_out(DATA)
        shapes.add(tuple(tuple(batch.targets_BS.shape) for batch in given))
    (shape,) = shapes
    assert shape == (((7, 16),) if eval_sequences else ((32, 16), (32, 15), (1, 7)))


def test_a_stream_has_a_whole_segment_at_least():
    batches = list(streams().held_out(DATA[:40]))
    assert [tuple(batch.tokens_BS.shape) for batch in batches] == [(2, 16), (2, 3), (1, 1)]


def test_text_below_a_segment_is_refused():
    with pytest.raises(ValueError, match="held-out part of the data has 16 bytes; block_size=16 needs 17"):
        next(streams().held_out(DATA[:16]))


def test_all_windows_are_evaluated_where_none_are_counted_off():
    batches = list(Windows(block_size=10, batch_size=7, eval_sequences=0, seed=1).held_out(DATA))
    assert sum(batch.counted for batch in batches) == 99


@pytest.mark.parametrize("kind", ["dense", "moe"])
def test_bits_per_byte_are_those_of_one_byte_after_the_other(tiny, kind):
    """The LSTM's state makes it the same computation, byte by byte, on probabilities."""
    config = change(tiny, model=LSTM | {"dropout": 0.0}, data={"eval_sequences": 0})
    trainer = make_trainer(config, kind)
    data = trainer.corpus.valid[: 32 * 40 + 1]
    model = trainer.model.eval()
    tokens, targets = data[:-1].long().view(32, 40), data[1:].long().view(32, 40)
    bits, state = 0.0, None
    with torch.no_grad():
        for i in range(40):
            logits, _, state = model(tokens[:, i : i + 1], None, state)
            chances = logits[:, 0].double().softmax(-1)
            bits -= chances[torch.arange(32), targets[:, i]].log2().sum().item()
    assert trainer.loss_on(data) == pytest.approx(bits / 1280, rel=1e-5)
    assert bits / 1280 == pytest.approx(8, abs=0.5)


@pytest.mark.parametrize("kind", ["dense", "moe"])
def test_bits_per_byte_of_a_model_without_memory_are_those_of_its_probabilities(tiny, kind):
    trainer = make_trainer(change(tiny, model={"dropout": 0.0}, data={"eval_sequences": 0}), kind)
    data = trainer.corpus.valid[:161].long()
    model = trainer.model.eval()
    with torch.no_grad():
        chances = model(data[:-1].view(10, 16))[0].double().softmax(-1)
    bits = -chances.gather(-1, data[1:].view(10, 16, 1)).log2().mean().item()
    assert trainer.loss_on(data) == pytest.approx(bits, rel=1e-5)
