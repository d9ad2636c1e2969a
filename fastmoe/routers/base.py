"""`Router`: the interface, its linear map, and the table of names."""

import inspect
from collections.abc import Callable
from typing import ClassVar, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastmoe._errors import check_int, unknown_name
from fastmoe._processes import ALONE, Processes
from fastmoe.routers.context import RoutingContext
from fastmoe.routers.routing import Routing, SoftRouting


class RouterLinear(nn.Linear):
    """`nn.Linear` without bias (a host may set one) whose arithmetic is float32 at least, whatever dtype or autocast.

    Routing in half precision flips choices between near experts (Fedus et al. 2021, 2101.03961, section 2.4).
    """

    def __init__(self, d_model: int, num_experts: int) -> None:
        super().__init__(d_model, num_experts, bias=False)

    def forward(self, x_TD: Tensor) -> Tensor:
        dtype = torch.promote_types(x_TD.dtype, torch.float32)
        device = x_TD.device.type
        bias_E = None if self.bias is None else self.bias.to(dtype)
        if not torch.amp.is_autocast_available(device):  # the meta device, for one
            return F.linear(x_TD.to(dtype), self.weight.to(dtype), bias_E)
        with torch.autocast(device, enabled=False):
            return F.linear(x_TD.to(dtype), self.weight.to(dtype), bias_E)


class Router(nn.Module):
    """Decides which experts each token goes to. Subclass it and write `forward(x_TD) -> Routing`.

    A subclass has `self.proj`, a linear map `(T, D) -> (T, E)` in float32 at least, `self.d_model`,
    `self.num_experts` and `self.top_k`. It knows nothing of processes or kernels.

    Attributes:
        takes_context: a subclass that sets this gets `forward(x_TD, context)`, a `RoutingContext`: padding is then
            among the tokens, as zeros. Any other router is called with the tokens that are not padding alone, which on
            a GPU waits for the device to know how many they are.
        needs_token_ids: the router decides by `context.token_ids_T`; set it together with `takes_context`.
        has_proj: whether the router has the linear map.
        own_init: whether `reset_parameters` gives weights that a model's own initialisation should leave alone.
        stats_scope: "global": balance losses and capacity are those of the batch of all processes in training;
            "local": of this process's.
    """

    takes_context: ClassVar[bool] = False
    needs_token_ids: ClassVar[bool] = False
    has_proj: ClassVar[bool] = True
    own_init: ClassVar[bool] = False
    stats_scope: str = "global"

    def __init__(self, d_model: int, num_experts: int, top_k: int = 2) -> None:
        super().__init__()
        self.d_model = check_int("d_model", d_model, 1)
        self.num_experts = check_int("num_experts", num_experts, 1)
        self.top_k = check_int("top_k", top_k, 1)
        if top_k > num_experts:
            raise ValueError(f"top_k must be at most num_experts, got top_k={top_k} of {num_experts} experts")
        if self.has_proj:
            self.proj = RouterLinear(d_model, num_experts)

    def reset_parameters(self) -> None:
        """Initialise the linear map as `nn.Linear` does."""
        if self.has_proj:
            self.proj.reset_parameters()

    @property
    def causal(self) -> bool:
        """Whether, in evaluation, what a token gets depends on no later token of its sequence."""
        return True

    def processes(self, context: RoutingContext) -> Processes:
        """Those whose batch this router's losses and capacity are of."""
        return context.processes if self.stats_scope == "global" else ALONE

    def forward(self, x_TD: Tensor) -> Routing | SoftRouting:
        raise TypeError(f"{type(self).__name__} must define forward(x_TD) -> fastmoe.Routing")

    def extra_repr(self) -> str:
        return f"num_experts={self.num_experts}, top_k={self.top_k}"


ROUTERS: dict[str, type[Router]] = {}

R = TypeVar("R", bound=type[Router])


def register_router(name: str) -> Callable[[R], R]:
    """Class decorator: make a router known by `name` to `fastmoe.MoE(router=name)`.

    Raises:
        ValueError: the name is taken by another class.
    """

    def register(cls: R) -> R:
        taken = ROUTERS.get(name)
        if taken is not None and (taken.__module__, taken.__qualname__) != (cls.__module__, cls.__qualname__):
            raise ValueError(f"router {name!r} is already registered, by {taken.__qualname__}")
        ROUTERS[name] = cls
        return cls

    return register


def get_router(name: str) -> type[Router]:
    """The class registered as `name`; `ValueError` with the nearest known name otherwise."""
    if name not in ROUTERS:
        raise unknown_name("router", name, ROUTERS)
    return ROUTERS[name]


def option_names(cls: type[Router]) -> list[str]:
    """The keyword arguments of a router's constructor, those that it hands on to its base classes included."""
    names: list[str] = []
    for base in cls.__mro__:
        parameters = inspect.signature(base.__init__).parameters.values()  # type: ignore[misc]
        names += [p.name for p in parameters if p.kind == p.KEYWORD_ONLY]
        if not any(p.kind == p.VAR_KEYWORD for p in parameters):
            break
    return names
