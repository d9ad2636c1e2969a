"""Text that a model writes."""

from __future__ import annotations

import torch
from torch import Tensor

from fastmoe._seeds import mix
from fastmoe.models.gpt import GPT
from fastmoe.models.sampling import sample
from fastmoe.train.trainer import Trainer

TEMPERATURE, TOP_K = 0.8, 40


def sample_text(trainer: Trainer, n: int) -> str:
    """`n` bytes that the model writes after a line break; all processes call it, since they share the experts."""
    device = trainer.world.device
    generator = torch.Generator(device).manual_seed(mix(trainer.config.run.seed, -1))
    prompt_BS = torch.tensor([list(b"\n")], device=device)
    if isinstance(trainer.model, GPT):
        tokens_BS = trainer.model.generate(prompt_BS, n, temperature=TEMPERATURE, top_k=TOP_K, generator=generator)
    else:
        tokens_BS = with_memory(trainer, prompt_BS, n, generator)
    return bytes(tokens_BS[0, 1:].tolist()).decode("utf-8", errors="replace")


@torch.no_grad()
def with_memory(trainer: Trainer, tokens_BS: Tensor, n: int, generator: torch.Generator) -> Tensor:
    """Token by token: what came before is in the model's memory."""
    trainer.model.eval()
    memory, written = None, [tokens_BS]
    for _ in range(n):
        logits_BSV, _, memory = trainer.model(written[-1], None, memory)
        written.append(sample(logits_BSV[:, -1].float(), TEMPERATURE, TOP_K, generator))
    trainer.model.train()
    return torch.cat(written, dim=1)
