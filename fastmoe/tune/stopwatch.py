"""The time of one call on the device alone."""

import time
from collections.abc import Callable

import torch

from fastmoe.bench.measure import flusher

_FLUSHES = 8


class Stopwatch:
    """On a GPU by events, behind reads that empty its caches and keep it busy until the call's launches are queued."""

    def __init__(self, device: torch.device) -> None:
        self.flush = None if device.type == "cpu" else flusher(str(device))

    def milliseconds(self, call: Callable[[], object]) -> float:
        if self.flush is None:
            start = time.perf_counter()
            call()
            return (time.perf_counter() - start) * 1e3
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        for _ in range(_FLUSHES):
            self.flush()
        begin.record()
        call()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end)
