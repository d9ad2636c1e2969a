"""The routers' randomness, all of it from torch's default generator, so that activation checkpointing repeats it."""

import torch
from torch import Tensor


def uniform(like: Tensor) -> Tensor:
    """Uniform in [0, 1), in the shape, dtype and device of `like`; no gradient."""
    return torch.rand_like(like)


def normal(like: Tensor) -> Tensor:
    """Of mean 0 and standard deviation 1, in the shape, dtype and device of `like`; no gradient."""
    return torch.randn_like(like)
