"""How the processes of a run find each other, also when torchrun has started them again."""

from __future__ import annotations

import time
import uuid
from datetime import timedelta

import torch.distributed as dist

PART = "fastmoe/part"
PAUSE = 0.02
STARTING = timedelta(minutes=10)


def meet(timeout: timedelta) -> tuple[dist.Store, int, int]:
    """A store that all processes of this start share, and no earlier one; this process's rank; how many there are.

    Processes wait longer for each other to start than the timeout, which is the store's from then on.

    Raises:
        RuntimeError: the others did not come.
    """
    patience = max(timeout, STARTING)
    store, rank, size = next(dist.rendezvous("env://", timeout=patience))
    store.set_timeout(patience)
    part = fresh_part(store, rank, size, patience)
    store.set_timeout(timeout)
    return part, rank, size


def fresh_part(store: dist.Store, rank: int, size: int, timeout: timedelta) -> dist.Store:
    """A part of the store to which no earlier start of the run has written.

    torchrun (of torch 2.13) keeps one store over all restarts: a process may find there the address of one that died
    (pytorch issue 135712). So the first process names a new part, and admits to it those who ask now.
    """
    token = uuid.uuid4().hex
    if rank == 0:
        store.set(PART, token)
        for other in range(1, size):
            store.set(_admission(token, store.get(_request(token, other)).decode()), "")
        return dist.PrefixStore(token, store)
    until = time.monotonic() + timeout.total_seconds()
    while True:
        part = store.get(PART).decode()
        store.set(_request(part, rank), token)
        if _admitted(store, part, token, until):
            return dist.PrefixStore(part, store)


def _admitted(store: dist.Store, part: str, token: str, until: float) -> bool:
    """Wait for the first process of the part; False if there is a newer part."""
    while not store.check([_admission(part, token)]):
        if store.get(PART).decode() != part:
            return False
        if time.monotonic() > until:
            raise RuntimeError("the first process did not come")
        time.sleep(PAUSE)
    return True


def _request(part: str, rank: int) -> str:
    return f"{part}/request/{rank}"


def _admission(part: str, token: str) -> str:
    return f"{part}/admission/{token}"
