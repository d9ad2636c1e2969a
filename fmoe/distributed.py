"""`DistributedGroupedDataParallel`: gradients reduced over the processes that share a parameter."""

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fastmoe._processes import Processes, collective

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

PLACE = "DistributedGroupedDataParallel"
ALWAYS_THERE = ("dp", "gate", "moe", "world")


class DistributedGroupedDataParallel(nn.Module):
    """Wraps a module; `allreduce_params()` after backward reduces each gradient over the group of its parameter.

    A parameter's `dp_comm` (see `FMoE.mark_parallel_comm`) names its group; without one it is "dp". Parameters of a
    name that no group was given for, as "none", are left alone. The processes of a group must have the same
    parameters of its name, in the same order. Buffers stay each process's own.

    Args:
        module: what is wrapped; its parameters get the prefix `module.`.
        auto_allreduce: False.
        need_sync: whether all parameters take their values from the first process of their group now.
        groups: `<name>_group=` for each name; None, and `dp_group`, `gate_group`, `moe_group` and `world_group` if
            not given, mean all processes.

    Raises:
        ValueError: an unknown argument; a group without this process; with `need_sync`, processes that have different
            parameters.
    """

    def __init__(
        self,
        module: nn.Module,
        auto_allreduce: bool = False,
        need_sync: bool = True,
        **groups: "ProcessGroup | None",
    ) -> None:
        super().__init__()
        if auto_allreduce:
            raise ValueError("auto_allreduce must be False: call allreduce_params() after backward, got True")
        unknown = [name for name in groups if not name.endswith("_group")]
        if unknown:
            raise ValueError(f"unknown arguments {', '.join(unknown)}: groups are given as <name>_group=")
        self.module = module
        named = {name.removesuffix("_group"): group for name, group in groups.items()}
        self._processes = {name: _processes_of(name, named.get(name)) for name in (*ALWAYS_THERE, *named)}
        if need_sync:
            self._sync_params()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the module returns."""
        return self.module(*args, **kwargs)

    def allreduce_params(
        self, no_scale: bool = False, reduce_after: bool = False, fp32_allreduce: bool = False
    ) -> None:
        """Replace each gradient by the mean over the processes of its group, none counting as zeros.

        A parameter without a gradient in all of them stays without. Every process must call this equally often.

        Args:
            no_scale: the sum instead.
            reduce_after: divide the sum, rather than what is summed.
            fp32_allreduce: sum in float32.

        Raises:
            ValueError: a sparse gradient.
        """
        for processes, parameters in self._shared():
            with_grad = _with_grad_anywhere(parameters, processes)
            if not with_grad:
                continue
            flat = _flatten([_dense(p) for p in with_grad])
            if fp32_allreduce:
                flat = flat.float()
            if not no_scale and not reduce_after:
                flat /= processes.size
            with collective(PLACE):
                dist.all_reduce(flat, group=processes.group)
            if not no_scale and reduce_after:
                flat /= processes.size
            _unflatten(flat, [_dense(p) for p in with_grad])

    def allreduce_gradients(
        self, no_scale: bool = False, reduce_after: bool = False, fp32_allreduce: bool = False
    ) -> None:
        """The other name of `allreduce_params`."""
        self.allreduce_params(no_scale, reduce_after, fp32_allreduce)

    def _sync_params(self) -> None:
        for processes, parameters in self._shared():
            _check_same(parameters, processes)
            flat = _flatten([p.detach() for p in parameters])
            with collective(PLACE):
                dist.broadcast(flat, group=processes.group, group_src=0)
            _unflatten(flat, [p.detach() for p in parameters])

    def _shared(self) -> list[tuple[Processes, list[nn.Parameter]]]:
        """The parameters that several processes have, by group, dtype and device, in the same order everywhere."""
        sets: dict[Any, list[nn.Parameter]] = {}
        for p in self.module.parameters():
            processes = self._processes.get(_name(p))
            if processes is not None and processes.size > 1:
                sets.setdefault((_name(p), p.dtype, p.device), []).append(p)
        return [(self._processes[name], parameters) for (name, _, _), parameters in sets.items()]


def _name(parameter: nn.Parameter) -> str:
    return getattr(parameter, "dp_comm", "dp")


def _processes_of(name: str, group: "ProcessGroup | None") -> Processes:
    processes = Processes.of(group)
    if processes.rank < 0:
        raise ValueError(f"{name}_group must be a group that this process is in")
    return dataclasses.replace(processes, place=PLACE)


def _check_same(parameters: Sequence[nn.Parameter], processes: Processes) -> None:
    sizes = torch.tensor([len(parameters), sum(p.numel() for p in parameters)], device=parameters[0].device)
    every = processes.gather(sizes).tolist()
    if any(one != every[0] for one in every):
        name = _name(parameters[0])
        raise ValueError(
            f"the processes of {name}_group must have the same parameters of dp_comm={name!r}, got by rank "
            f"{', '.join(f'{count} with {numbers} numbers' for count, numbers in every)}"
        )


def _with_grad_anywhere(parameters: Sequence[nn.Parameter], processes: Processes) -> list[nn.Parameter]:
    """Those with a gradient in any process: all must reduce the same ones."""
    here = torch.tensor([p.grad is not None for p in parameters], dtype=torch.int32, device=parameters[0].device)
    return [p for p, count in zip(parameters, processes.sum(here).tolist(), strict=True) if count]


def _dense(parameter: nn.Parameter) -> Tensor:
    """The gradient, which is zeros from now on where there is none."""
    if parameter.grad is None:
        parameter.grad = torch.zeros_like(parameter)
    if parameter.grad.layout != torch.strided:
        raise ValueError(f"gradients must be dense, got {parameter.grad.layout} {tuple(parameter.shape)}")
    return parameter.grad.detach()


def _flatten(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([tensor.reshape(-1) for tensor in tensors])


def _unflatten(flat: Tensor, tensors: Sequence[Tensor]) -> None:
    for part, tensor in zip(flat.split([tensor.numel() for tensor in tensors]), tensors, strict=True):
        tensor.copy_(part.view_as(tensor))
