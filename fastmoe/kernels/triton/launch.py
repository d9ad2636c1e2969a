"""What every launch needs to know of the machine."""

from collections.abc import Callable
from functools import cache, wraps
from typing import Any, ParamSpec, TypeVar

import torch
import triton
from torch import Tensor

P = ParamSpec("P")
R = TypeVar("R")


def on_its_device(function: Callable[P, R]) -> Callable[P, R]:
    """Triton launches on the current device: make it that of the first argument, a tensor."""

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        with torch.cuda.device_of(args[0]):
            return function(*args, **kwargs)

    return call


@cache
def num_processors(device: torch.device) -> int:
    """Multiprocessors of a GPU; under the interpreter a few, so that one program does several tiles."""
    if device.type == "cpu":
        return 3
    return torch.cuda.get_device_properties(device).multi_processor_count


def precision(dtype: torch.dtype) -> str:
    """How float32 products are taken: by PyTorch's own switch; on AMD, where few GPUs have TF32, in full."""
    tf32 = torch.version.hip is None and dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"
    return "tf32" if tf32 else "ieee"


def contiguous(*tensors: Tensor | None) -> tuple[Any, ...]:
    return tuple(None if t is None else t.contiguous() for t in tensors)


def power_of_two(number: int, low: int, high: int) -> int:
    """The least power of two that is no smaller than `number`, within bounds."""
    return max(low, min(high, triton.next_power_of_2(number)))
