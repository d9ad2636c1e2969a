"""Processes that meet in a store which earlier ones have used."""

import threading
import time
from datetime import timedelta

import pytest
import torch.distributed as dist

from fastmoe.train.rendezvous import fresh_part

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="PyTorch without torch.distributed")


def meet(store, size, late):
    """What each of `size` processes finds in its part, after the first has written there; one of them comes late."""
    found = [None] * size

    def come(rank):
        time.sleep(0.2 * (rank == late))
        part = fresh_part(store, rank, size, timedelta(seconds=20))
        if rank == 0:
            part.set("who", f"{late}")
        found[rank] = part.get("who").decode()

    threads = [threading.Thread(target=come, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def test_nobody_reads_what_an_earlier_start_has_written():
    store = dist.HashStore()
    store.set_timeout(timedelta(seconds=20))
    for late in (0, 1, 2, 0):
        assert meet(store, 3, late) == [f"{late}"] * 3


def test_when_the_others_do_not_come():
    store = dist.HashStore()
    store.set_timeout(timedelta(seconds=1))
    for rank in (0, 1):
        with pytest.raises(RuntimeError):
            fresh_part(store, rank, 2, timedelta(seconds=1))
