"""A function on several processes with Megatron-Core on the CPU, in either version that the tests run with.

To import Megatron-Core takes seconds, and what it keeps for a process is hard to undo: a server per version imports it
once, and every call runs in processes that are forked from there and end with the call.
"""

import atexit
import functools
import importlib.util
import io
import multiprocessing
import os
import pickle
import sys
import traceback
import warnings
from pathlib import Path

import processes
import torch

NEWEST = Path(sys.prefix) / "megatron-newest"  # as the Makefile installs it
VERSIONS = {"installed": importlib.util.find_spec("megatron"), "newest": NEWEST.is_dir()}


def run(version, world, function, *args, tp=1, pp=1, ep=1, etp=None, cp=1, seed=1, limit=60, **kwargs):
    """What `function(*args, **kwargs)` returns on each of `world` processes, by rank.

    There, `parallel_state` has these sizes, and everything is seeded. The function is found by its module and name.

    Raises:
        AssertionError: as `processes.run`.
    """
    sizes = {
        "tensor_model_parallel_size": tp,
        "pipeline_model_parallel_size": pp,
        "expert_model_parallel_size": ep,
        "expert_tensor_parallel_size": etp,
        "context_parallel_size": cp,
    }
    connection = _servers()[version]
    try:
        connection.send_bytes(pickle.dumps((limit, world, sizes, seed, functools.partial(function, *args, **kwargs))))
        assert connection.poll((world + 1) * limit), f"no answer from Megatron-Core, {version}"
        returned, answer = torch.load(io.BytesIO(connection.recv_bytes()), weights_only=False)
    except BaseException:
        connection.close()  # which ends the server, and its processes when their time is over
        _servers.cache_clear()
        raise
    assert returned, answer
    return answer


@functools.cache
def _servers():
    """The connection to the server of each version. They import side by side."""
    return {version: _start(version) for version, found in VERSIONS.items() if found}


def _start(version):
    here, there = processes.CONTEXT.Pipe()
    processes.CONTEXT.Process(target=_serve, args=(there, version)).start()
    there.close()
    atexit.register(here.close)  # before multiprocessing waits for its processes
    return here


def _serve(connection, version):
    if version == "newest":
        sys.path.insert(0, str(NEWEST))
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # that TransformerEngine and Apex are not there
    import megatron_cpu

    megatron_cpu.install()
    processes.CONTEXT = multiprocessing.get_context("fork")
    while True:
        try:
            limit, *given = pickle.loads(connection.recv_bytes())
            answer = True, processes.run(given[0], _within, *given[1:], limit=limit)
        except EOFError:
            os._exit(0)  # without Triton's many words about what it still holds
        except Exception as error:
            answer = False, str(error) if isinstance(error, AssertionError) else traceback.format_exc()
        written = io.BytesIO()
        torch.save(answer, written)  # Megatron-Core has its own way to pickle tensors
        connection.send_bytes(written.getbuffer())


def _within(sizes, seed, function):
    from megatron.core import parallel_state, tensor_parallel

    parallel_state.initialize_model_parallel(**sizes)
    tensor_parallel.model_parallel_cuda_manual_seed(seed)
    torch.manual_seed(seed)
    return function()
