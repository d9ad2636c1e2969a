"""Text that a model writes."""

import pytest
import torch
from tiny_run import LSTM, change, make_trainer

from fastmoe.train import sample
from fastmoe.train.sample import sample_text, with_memory

SHAPES = {"gpt": {}, "lstm": LSTM, "transformer_xl": {"arch": "transformer_xl", "model_options": {"memory_length": 64}}}


@pytest.mark.parametrize("arch", SHAPES)
def test_a_seed_writes_one_text_and_dropout_is_off(tiny, arch):
    trainer = make_trainer(change(tiny, model=SHAPES[arch] | {"dropout": 0.5}))
    texts = {sample_text(trainer, 12) for _ in range(3)}
    assert len(texts) == 1
    assert all(module.training for module in trainer.model.modules())


@pytest.mark.parametrize("arch", ["lstm", "transformer_xl"])
def test_what_came_before_is_remembered(tiny, arch, monkeypatch):
    """Scores byte by byte are those of the whole text read at once."""
    trainer = make_trainer(change(tiny, model=SHAPES[arch]))
    text_BS, seen = torch.randint(256, (1, 20)), []

    def next_byte(logits_BV, *options):
        seen.append(logits_BV)
        return text_BS[:, len(seen), None]

    monkeypatch.setattr(sample, "sample", next_byte)
    assert torch.equal(with_memory(trainer, text_BS[:, :1], 19, torch.Generator()), text_BS)
    trainer.model.eval()
    logits_BSV, _, _ = trainer.model(text_BS[:, :-1])
    torch.testing.assert_close(torch.stack(seen, 1), logits_BSV)
