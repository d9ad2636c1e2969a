"""What Megatron-Core needs of `torch.cuda` where there is no CUDA: each thing here is a call that it just makes.

It is installed in processes of their own, before `megatron.core` is imported; fastmoe itself never sees CUDA there.
"""

import contextlib

import torch
from torch.overrides import TorchFunctionMode

CPU = torch.device("cpu")


def install():
    """For the rest of this process."""
    _calls()
    _OnCPU().__enter__()  # for good: for this thread, and for processes that are forked from it
    _megatron_itself()


class _OnCPU(TorchFunctionMode):
    """`device="cuda"` and `tensor.cuda()` mean the CPU; a tensor's type is the type that its CUDA twin would have.

    The types are how Megatron's optimizer knows which parameters are of 32 bits and which of 16.
    """

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is torch.Tensor.cuda:
            return args[0]
        if function is torch.Tensor.type and len(args) == 1 and not kwargs:
            return function(*args).replace("torch.", "torch.cuda.")
        if kwargs.get("device") is not None and torch.device(kwargs["device"]).type == "cuda":
            kwargs = {**kwargs, "device": CPU}
        return function(*args, **kwargs)


def _calls():
    cuda = torch.cuda
    cuda.current_device = lambda: CPU  # given on as device=
    cuda.get_rng_state = cuda.random.get_rng_state = lambda *_, **__: (
        torch.get_rng_state()
    )  # dropout draws from it here
    cuda.manual_seed = torch.manual_seed  # torch's own keeps it until CUDA is there
    cuda.synchronize = lambda *_: None  # between messages of the pipeline, before a checkpoint is written
    cuda.Stream = cuda.Event = _Stream  # the all-to-all dispatcher and DistributedDataParallel make one
    cuda.current_stream = cuda.default_stream = lambda *_: _Stream()
    cuda.stream = lambda _: contextlib.nullcontext()


class _Stream:
    """A stream, or an event of one: nothing waits where all is done when it is called."""

    def __init__(self, *_, **__):
        pass

    def __getattr__(self, name):
        return lambda *_, **__: self


def _megatron_itself():
    from megatron.core.tensor_parallel import random
    from megatron.core.transformer.moe import moe_utils, token_dispatcher

    random._set_cuda_rng_state = lambda state, *_, **__: torch.set_rng_state(state)  # it speaks to CUDA's generators

    def moved(tensor, as_numpy=False, record_stream=False):
        """As from a GPU: the sizes of an all-to-all are turned into numbers only on the way from there."""
        return tensor.numpy() if as_numpy and isinstance(tensor, torch.Tensor) else tensor

    token_dispatcher.maybe_move_tensor_to_cpu = moved
    moe_utils.te_general_gemm = None  # 0.16 asks whether it is None, and has no such name without TransformerEngine
