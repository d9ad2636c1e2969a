"""What keeps replicas alike: PyTorch's `DistributedDataParallel`, or its `fully_shard`."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from fastmoe.experts import MLPExperts
from fastmoe.model import moe_layers
from fastmoe.parallel.layout import Layout
from fastmoe.parallel.shard import expert_parameters

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh


@dataclass
class Parallel:
    """What `parallelize` made of a model; its attribute `fastmoe_parallel`.

    `held_back`: in how many `no_sync` the model is.
    """

    layout: Layout
    engine: str
    replicas: list[Replicas] = field(default_factory=list)
    held_back: int = 0


class Replicas:
    """`DistributedDataParallel` over some parameters of a model, in place: no wrapper, names stay as they are.

    It is made at the first forward pass, when a model built on the meta device has its memory, and anew when parameters
    are frozen or unfrozen.
    """

    def __init__(self, experts: bool, group: ProcessGroup, options: dict[str, Any]) -> None:
        self.experts, self.group, self.options = experts, group, options
        self.ddp: DistributedDataParallel | None = None
        self.trained: list[nn.Parameter] = []
        self.synchronise = True

    def before(self, model: nn.Module, args: Any, kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return None
        self._follow(model)
        if self.ddp is None:
            return None
        self.ddp.require_backward_grad_sync = self.synchronise
        return self.ddp._pre_forward(*args, **kwargs)

    def after(self, model: nn.Module, args: Any, output: Any) -> Any:
        return self.ddp._post_forward(output) if torch.is_grad_enabled() and self.ddp is not None else None

    def _follow(self, model: nn.Module) -> None:
        """Start anew where other parameters are trained than before."""
        trained = [p for p in model.parameters() if p.requires_grad]
        if len(trained) == len(self.trained) and all(map(operator.is_, trained, self.trained)):
            return
        self.ddp, self.trained = None, trained
        own = [p for p in parameters_of(model, experts=self.experts) if p.requires_grad and p.numel()]
        if own:
            self.ddp = DistributedDataParallel(nn.ParameterList(own), process_group=self.group, **self.options)

    def __deepcopy__(self, memo: dict[int, Any]) -> Replicas:
        """For a copy of the model: over the same processes."""
        return memo.setdefault(id(self), Replicas(self.experts, self.group, self.options))


def parameters_of(model: nn.Module, *, experts: bool) -> list[nn.Parameter]:
    """The parameters of the routed experts, or all others; each once."""
    routed = {p for layer in moe_layers(model).values() for p in expert_parameters(layer).values()}
    return [p for p in model.parameters() if (p in routed) == experts]


def use_ddp(model: nn.Module, parallel: Parallel, options: dict[str, Any]) -> None:
    """Dense parameters over the whole batch's processes, experts over their replicas."""
    layout = parallel.layout
    for mesh, experts in ((layout.batch, False), (layout.replicas, True)):
        if mesh is not None and mesh.size() > 1:
            replicas = Replicas(experts, mesh.get_group(), options)
            model.register_forward_pre_hook(replicas.before, with_kwargs=True)
            model.register_forward_hook(replicas.after)
            parallel.replicas.append(replicas)


def use_fsdp(model: nn.Module, parallel: Parallel, blocks: Sequence[type[nn.Module]], options: dict[str, Any]) -> None:
    """Each layer's experts over their replicas, the rest over all processes; `blocks` are sharded one by one."""
    from torch.distributed.fsdp import fully_shard

    layout = parallel.layout
    assert layout.batch is not None
    apart: set[nn.Parameter] = set()
    for layer in moe_layers(model).values():
        if layout.replicas is None:
            apart.update(expert_parameters(layer).values())
            continue
        for shared in layer.experts.children():  # a module given as activation
            if isinstance(layer.experts, MLPExperts) and list(shared.parameters()):
                fully_shard(shared, mesh=layout.batch, **options)
        fully_shard(layer.experts, mesh=layout.replicas, **options)
    inner = [module for module in model.modules() if module is not model and isinstance(module, tuple(blocks))]
    for module in [*reversed(inner), model]:
        fully_shard(module, mesh=layout.batch, ignored_params=apart, **options)


def broadcast(tensors: Iterable[Tensor], mesh: DeviceMesh | None) -> None:
    """The first process's values to all, so that replicas start alike."""
    if mesh is None or mesh.size() == 1:
        return
    for tensor in tensors:
        if not tensor.is_meta and tensor.numel():
            values = tensor.detach().contiguous()
            dist.broadcast(values.reshape(-1).view(torch.uint8), group=mesh.get_group(), group_src=0)
            tensor.detach().copy_(values)


@contextmanager
def no_sync(model: nn.Module) -> Iterator[None]:
    """Inside this context backward adds up gradients and does not synchronise them: for gradient accumulation.

    ```
    for i, batch in enumerate(micro_batches):
        with fastmoe.no_sync(model) if i + 1 < len(micro_batches) else contextlib.nullcontext():
            (loss_of(model, batch) / len(micro_batches)).backward()
    ```

    As with `DistributedDataParallel.no_sync`, the forward pass must be inside too.

    Raises:
        ValueError: the model was not given to `fastmoe.parallelize`.
    """
    found = [(module, parallel) for module in model.modules() if (parallel := parallel_of(module)) is not None]
    if not found:
        raise ValueError(f"{type(model).__name__} is not parallel: call fastmoe.parallelize(model, mesh) first")
    for module, parallel in found:
        _hold_back(module, parallel, 1)
    try:
        yield
    finally:
        for module, parallel in found:
            _hold_back(module, parallel, -1)


def _hold_back(model: nn.Module, parallel: Parallel, more: int) -> None:
    parallel.held_back += more
    for replicas in parallel.replicas:
        replicas.synchronise = not parallel.held_back
    if parallel.engine == "fsdp":
        model.set_requires_gradient_sync(not parallel.held_back)  # type: ignore[operator]


def parallel_of(module: nn.Module) -> Parallel | None:
    """What `parallelize` made of the module itself; None if nothing."""
    found = getattr(module, "fastmoe_parallel", None)
    return found if isinstance(found, Parallel) else None


def find_parallel(model: nn.Module) -> Parallel | None:
    """What `parallelize` made of the model, or of one that it wraps; None if nothing."""
    return next((found for module in model.modules() if (found := parallel_of(module)) is not None), None)
