"""What Megatron-Core needs of `torch.cuda` where there is no CUDA: each thing here is a call that it just makes.

It is installed in processes of their own, before `megatron.core` is imported; fastmoe itself never sees CUDA there.
"""

import contextlib
import logging
import queue

import torch

CPU = torch.device("cpu")


def install():
    """For the rest of this process, and for those forked from it."""
    _torch_cuda()
    _tensors()
    _megatron()


def _torch_cuda():
    cuda = torch.cuda
    cuda.current_device = lambda: CPU  # given on as device=
    cuda.get_rng_state = cuda.random.get_rng_state = lambda *_, **__: (
        torch.get_rng_state()
    )  # dropout draws from it here
    cuda.manual_seed = torch.manual_seed  # torch's own keeps it until CUDA is there
    cuda.synchronize = lambda *_: None  # between messages of the pipeline, before a checkpoint is written
    cuda.Stream = cuda.Event = _Stream  # the all-to-all dispatcher and DistributedDataParallel make one
    cuda.current_stream = cuda.default_stream = _Stream
    cuda.stream = lambda _: contextlib.nullcontext()


class _Stream:
    """A stream, or an event of one: nothing waits where all is done when it is called."""

    def __init__(self, *_, **__):
        pass

    def __getattr__(self, name):
        return lambda *_, **__: self


def _tensors():
    for name in ("tensor", "zeros", "ones", "empty", "empty_like"):  # which are called with device="cuda"
        setattr(torch, name, _on_cpu(getattr(torch, name)))
    torch.Tensor.cuda = lambda tensor, *_, **__: tensor
    kind = torch.Tensor.type  # by it, the optimizer tells parameters of 32 bits from those of 16, on CUDA only
    torch.Tensor.type = lambda tensor, *args: (
        kind(tensor, *args) if args else kind(tensor).replace("torch.", "torch.cuda.")
    )


def _on_cpu(make):
    def call(*args, device=None, **kwargs):
        return make(*args, device=CPU if device == "cuda" else device, **kwargs)

    return call


def _megatron():
    from megatron.core.dist_checkpointing.strategies import filesystem_async
    from megatron.core.tensor_parallel import random
    from megatron.core.transformer.moe import moe_utils, token_dispatcher
    from megatron.core.transformer.torch_norm import WrappedTorchNorm

    random._set_cuda_rng_state = lambda state, *_, **__: torch.set_rng_state(state)  # it speaks to CUDA's generators
    logging.getLogger(random.__name__).setLevel(logging.ERROR)  # that the CPU's generator has changed, which is CUDA's
    token_dispatcher.maybe_move_tensor_to_cpu = _moved
    moe_utils.te_general_gemm = None  # 0.16 asks whether it is None, and has no such name without TransformerEngine
    WrappedTorchNorm.__new__ = _norm
    filesystem_async._results_queue = queue.Queue()  # a process of its own, which stays behind, is for writing later


def _moved(tensor, as_numpy=False, record_stream=False):
    """As from a GPU: the sizes of an all-to-all become numbers on the way from there only."""
    return tensor.numpy() if as_numpy and isinstance(tensor, torch.Tensor) else tensor


def _norm(cls, config, hidden_size, eps=1e-5, **_):
    """As Apex's: with sequence parallelism it marks its parameters, where Megatron's stand-in for it refuses to be."""
    norm = {"LayerNorm": torch.nn.LayerNorm, "RMSNorm": torch.nn.RMSNorm}[config.normalization](hidden_size, eps=eps)
    for parameter in norm.parameters():
        parameter.sequence_parallel = config.sequence_parallel
    return norm
