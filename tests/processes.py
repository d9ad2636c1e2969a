"""A function on several processes that are one gloo group.

They are forked from a server that has imported what they need, where the system can: to start them costs little.
"""

import io
import multiprocessing
import os
import tempfile
import traceback
from contextlib import contextmanager
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

needs_gloo = pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="PyTorch without gloo")

FORKSERVER = "forkserver" in multiprocessing.get_all_start_methods()
CONTEXT = multiprocessing.get_context("forkserver" if FORKSERVER else "spawn")
if FORKSERVER:
    CONTEXT.set_forkserver_preload(["pytest", "fastmoe", "torch._dynamo", "torch.distributed.fsdp"])


def run(world, function, *args, limit=240):
    """What `function(*args)` returns on each of `world` processes, by rank.

    Raises:
        AssertionError: with its traceback where one raises; or one ends, or is not done within `limit` seconds.
    """
    with started(world, function, *args) as running:
        answers = [answer_of(*one, limit) for one in running]
    wrong = [f"process {rank} of {world}: {answer}" for rank, (returned, answer) in enumerate(answers) if not returned]
    assert not wrong, "\n".join(wrong)
    return [answer for _, answer in answers]


@contextmanager
def started(world, function, *args, timeout=60, together=True):
    """The running processes, each with the connection that its answer comes through.

    `timeout`: of the gloo group; `together`: they wait for each other before they end.
    """
    with tempfile.TemporaryDirectory() as folder:
        running = []
        for rank in range(world):
            here, there = CONTEXT.Pipe(duplex=False)
            given = there, f"file://{folder}/rendezvous", rank, world, timeout, together, function, args
            process = CONTEXT.Process(target=_process, args=given)
            process.start()
            there.close()
            running.append((process, here))
        try:
            yield running
        finally:
            for process, connection in running:
                process.kill()
                process.join()
                connection.close()


def answer_of(process, connection, limit):
    """(True, what the function returned) or (False, the traceback, or how the process ended without one)."""
    if not connection.poll(limit):
        return False, f"no answer within {limit} s"
    try:
        return torch.load(io.BytesIO(connection.recv_bytes()), weights_only=False)
    except EOFError:
        process.join()
        return False, f"it ended with exit code {process.exitcode}"


def _process(connection, rendezvous, rank, world, timeout, together, function, args):
    torch.set_num_threads(1)
    try:
        limit = timedelta(seconds=timeout)
        dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=world, timeout=limit)
        answer = True, function(*args)
        if together:
            dist.barrier()
    except BaseException:
        answer = False, traceback.format_exc()
    written = io.BytesIO()
    torch.save(answer, written)
    connection.send_bytes(written.getbuffer())
    os._exit(0)  # not to wait for a process that is not there any more
