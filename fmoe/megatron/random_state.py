"""The state of each process's random numbers, in a checkpoint."""

import random
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.tensor_parallel import get_cuda_rng_tracker

from fastmoe.parallel.checkpoint_together import Together


class RandomState:
    """Of Python, PyTorch and Megatron's tracker; by rank, so it fits as many processes as have saved it.

    Args:
        together: all processes.
    """

    key = "random_state"

    def __init__(self, together: Together) -> None:
        self.together = together

    def sharded(self) -> ShardedObject:
        """For Megatron's distributed checkpoints: the state here and now."""
        state: dict[str, Any] = {
            "python": random.getstate(),
            "torch": torch.get_rng_state(),
            "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
            "megatron": get_cuda_rng_tracker().get_states(),
        }
        return ShardedObject(self.key, state, (self.together.size,), (self.together.rank,))

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from a state."""
        random.setstate(state["python"])
        torch.set_rng_state(state["torch"])
        if state["cuda"] is not None and torch.cuda.is_available():
            torch.cuda.set_rng_state(state["cuda"])
        get_cuda_rng_tracker().set_states(state["megatron"])
