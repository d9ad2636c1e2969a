"""Batches are a pure function of (seed, step, share)."""

import pytest
import torch

from fastmoe.train.batches import Share, draw_batch, held_out, mix

DATA = torch.randint(256, (5000,), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def draw(step=3, share=None, seed=7, batch_size=12):
    return draw_batch(DATA, 16, batch_size, seed=seed, step=step, share=share or Share())


def test_the_same_numbers_draw_the_same_batch_whatever_else_is_random():
    first = draw()
    torch.manual_seed(99)
    assert all(torch.equal(a, b) for a, b in zip(first, draw(), strict=True))
    assert not torch.equal(first[0], draw(step=4)[0])
    assert not torch.equal(first[0], draw(seed=8)[0])


def test_targets_are_the_bytes_after_the_tokens():
    tokens, targets = draw()
    assert tokens.shape == targets.shape == (12, 16)
    assert tokens.dtype == torch.int64
    assert torch.equal(tokens[:, 1:], targets[:, :-1])
    starts = [bytes(DATA.tolist()).index(bytes(row)) for row in tokens.tolist()]
    assert all(DATA[start + 16] == targets[i, -1] for i, start in enumerate(starts))


@pytest.mark.parametrize(("micro_steps", "world_size"), [(1, 2), (3, 1), (2, 3), (4, 1)])
def test_shares_make_up_the_whole_batch(micro_steps, world_size):
    shares = [Share(m, micro_steps, r, world_size) for m in range(micro_steps) for r in range(world_size)]
    assert torch.equal(torch.cat([draw(share=share)[0] for share in shares]), draw()[0])


def test_a_batch_that_does_not_divide_is_refused():
    with pytest.raises(ValueError, match=r"multiple of grad_accumulation \* processes = 5 \* 1; got 12"):
        draw(share=Share(0, 5))


def test_every_start_can_be_drawn_and_none_beyond_the_end():
    data = torch.arange(18, dtype=torch.uint8)
    tokens, targets = draw_batch(data, 16, 200, seed=0, step=0)
    assert set(tokens[:, 0].tolist()) == {0, 1}
    assert targets.max() == 17


def test_held_out_windows_are_spread_and_do_not_overlap():
    data = torch.arange(201, dtype=torch.uint8)
    tokens, _ = held_out(data, 10, 5)
    assert tokens[:, 0].tolist() == [0, 40, 80, 120, 160]
    everything, targets = held_out(data, 10, 999)
    assert everything[:, 0].tolist() == list(range(0, 200, 10))
    assert targets[-1, -1] == 200


@pytest.mark.parametrize(
    "draws", [lambda data: draw_batch(data, 16, 1, seed=0, step=0), lambda data: held_out(data, 16, 1)]
)
def test_data_shorter_than_a_window_is_refused(draws):
    draws(DATA[:17])
    with pytest.raises(ValueError, match="has 16 bytes; block_size=16 needs 17"):
        draws(DATA[:16])


def test_mixed_seeds_differ():
    seeds = {mix(seed, step, rank) for seed in range(10) for step in range(10) for rank in range(10)}
    assert len(seeds) == 1000
    assert all(0 <= seed < 2**63 for seed in seeds)
