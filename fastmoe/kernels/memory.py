"""Large buffers on a CPU that live across steps.

The gradient of stacked weights is as large as the weights, and fresh in every step. Linux hands out fresh memory page
by page, on first touch, and that takes longer than the products that fill it. So large buffers are kept when the last
tensor on them goes, and handed out again, as PyTorch does on a GPU; and they are asked for in pages of 2 MiB.
"""

import mmap
import sys
import weakref
from bisect import bisect_left, insort
from collections import deque
from threading import Lock

import torch
from torch import Tensor

_PAGE = 2 << 20
_MIN_BYTES = 1 << 20  # below, the allocator's own reuse is as good
_MAX_WASTE = 4  # a kept buffer serves what is at least a fourth of it; pages never touched take no memory
_CAN_MAP = sys.platform == "linux" and hasattr(mmap, "MADV_HUGEPAGE")


class _Pool:
    """Buffers that no tensor uses, smallest first."""

    def __init__(self) -> None:
        self.kept: list[tuple[int, int, mmap.mmap]] = []
        self.returned: deque[mmap.mmap] = deque()
        self.lock = Lock()

    def take(self, size: int) -> mmap.mmap:
        with self.lock:
            self._sort_in()
            index = bisect_left(self.kept, (size,))
            if index < len(self.kept) and self.kept[index][0] <= _MAX_WASTE * size:
                return self.kept.pop(index)[2]
            self._make_room(size)
        buffer = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        buffer.madvise(mmap.MADV_HUGEPAGE)
        return buffer

    def give(self, buffer: mmap.mmap) -> None:
        """Called when a tensor is freed: in any thread, and between any two lines, those of `take` too."""
        self.returned.append(buffer)

    def clear(self) -> None:
        with self.lock:
            self._sort_in()
            self.kept.clear()

    def _sort_in(self) -> None:
        while self.returned:
            buffer = self.returned.popleft()
            insort(self.kept, (len(buffer), id(buffer), buffer))

    def _make_room(self, size: int) -> None:
        """Give back as much as is about to be asked for, smallest first: what is kept does not add to the need."""
        while self.kept and size > 0:
            size -= self.kept.pop(0)[0]


_pool = _Pool()


def new_buffer(like: Tensor, *shape: int) -> Tensor:
    """An uninitialised tensor in the dtype and on the device of `like`; large ones on a CPU from kept memory."""
    count = 1
    for size in shape:
        count *= size
    needed = count * like.element_size()
    if not _CAN_MAP or needed < _MIN_BYTES or like.device.type != "cpu":
        return like.new_empty(shape)
    buffer = _pool.take(-(-needed // _PAGE) * _PAGE)
    view = memoryview(buffer)
    returned = weakref.finalize(view, _pool.give, buffer)
    returned.atexit = False
    return torch.frombuffer(view, dtype=like.dtype, count=count).view(shape)


def empty_cache() -> None:
    """Give the memory that fastmoe keeps for its next large CPU buffers back to the system; tensors in use stay."""
    _pool.clear()
