"""Where new parameters are made."""

from contextlib import AbstractContextManager, nullcontext

import torch


def on_device(device: torch.device | str | None) -> AbstractContextManager[object]:
    """Inside it tensors are made on `device`; None leaves the default device as it is."""
    return nullcontext() if device is None else torch.device(device)
