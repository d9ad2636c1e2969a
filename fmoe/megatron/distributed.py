"""`DistributedDataParallel`: Megatron-Core's own, by FastMoE's arguments."""

from typing import Any

from megatron.core import distributed
from torch import nn


class DistributedDataParallel(distributed.DistributedDataParallel):
    """Megatron-Core's wrapper, which reduces each gradient over the processes that share the parameter.

    Megatron's schedules reduce by themselves, if the configuration does not name another `finalize_model_grads_func`
    already. Between steps, call `zero_grad_buffer()` and the optimizer's `zero_grad()`, both.

    Args:
        module: with a `config`, as every model of Megatron-Core.
        accumulate_allreduce_grads_in_fp32: keep gradients in float32.
        use_contiguous_buffers_in_ddp: either; Megatron-Core's gradients always stand in contiguous buffers.
        ddp_options: further fields of Megatron's `DistributedDataParallelConfig`.
    """

    def __init__(
        self,
        module: nn.Module,
        accumulate_allreduce_grads_in_fp32: bool = False,
        use_contiguous_buffers_in_ddp: bool = True,
        **ddp_options: Any,
    ) -> None:
        config: Any = module.config
        options = {"grad_reduce_in_fp32": accumulate_allreduce_grads_in_fp32} | ddp_options
        super().__init__(config, distributed.DistributedDataParallelConfig(**options), module)
        if config.finalize_model_grads_func is None:
            config.finalize_model_grads_func = distributed.finalize_model_grads

    def allreduce_params(self) -> None:
        """Reduce the gradients, after a backward pass that no schedule of Megatron ran. All processes must call it."""
        distributed.finalize_model_grads([self])

    def allreduce_gradients(self) -> None:
        """The other name of `allreduce_params`."""
        self.allreduce_params()
