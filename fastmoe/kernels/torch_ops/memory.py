"""Large fresh buffers on a CPU.

The gradient of stacked weights is as large as the weights, and allocated anew in every step. Linux hands such memory
out page by page, on first touch: with 4 KiB pages that takes longer than the matrix product that fills it. The hint
below asks for 2 MiB pages. It changes no value, and is ignored where the system does not know it.
"""

import ctypes
import sys
from collections.abc import Callable
from functools import cache

from torch import Tensor

_HUGE_PAGE = 2 << 20
_MADV_HUGEPAGE = 14  # from Linux's <sys/mman.h>
_MIN_BYTES = 32 << 20  # glibc gives smaller blocks from its heap, whose pages were touched before


def new_large(like: Tensor, *shape: int) -> Tensor:
    """An uninitialised tensor in the dtype and on the device of `like`."""
    out = like.new_empty(shape)
    size = out.numel() * out.element_size()
    if size >= _MIN_BYTES and out.device.type == "cpu" and sys.platform == "linux":
        start = -(-out.data_ptr() // _HUGE_PAGE) * _HUGE_PAGE
        end = (out.data_ptr() + size) // _HUGE_PAGE * _HUGE_PAGE
        _madvise()(start, end - start, _MADV_HUGEPAGE)
    return out


@cache
def _madvise() -> Callable[[int, int, int], int]:
    function = ctypes.CDLL(None).madvise
    function.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return function
