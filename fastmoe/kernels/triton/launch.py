"""What every launch needs to know of the machine."""

from functools import cache
from typing import Any

import torch
import triton
from torch import Tensor


@cache
def num_processors(device: torch.device) -> int:
    """Multiprocessors of a GPU; under the interpreter a few, so that one program does several tiles."""
    if device.type == "cpu":
        return 3
    return torch.cuda.get_device_properties(device).multi_processor_count


def precision(dtype: torch.dtype) -> str:
    """How float32 products are taken: by PyTorch's own switch."""
    tf32 = dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"
    return "tf32" if tf32 else "ieee"


def contiguous(*tensors: Tensor | None) -> tuple[Any, ...]:
    return tuple(None if t is None else t.contiguous() for t in tensors)


def power_of_two(number: int, low: int, high: int) -> int:
    """The least power of two that is no smaller than `number`, within bounds."""
    return max(low, min(high, triton.next_power_of_2(number)))
