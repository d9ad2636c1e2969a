"""`Router`: the interface, its linear map, and the table of names."""

from collections.abc import Callable
from typing import ClassVar, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastmoe._errors import check_int, unknown_name
from fastmoe.routers.routing import Routing


class RouterLinear(nn.Linear):
    """`nn.Linear` without bias whose arithmetic is float32 at least, whatever the model's dtype or autocast.

    Routing in half precision flips choices between near experts (Fedus et al. 2021, 2101.03961, section 2.4).
    """

    def __init__(self, d_model: int, num_experts: int) -> None:
        super().__init__(d_model, num_experts, bias=False)

    def forward(self, x_TD: Tensor) -> Tensor:
        dtype = torch.promote_types(x_TD.dtype, torch.float32)
        device = x_TD.device.type
        if not torch.amp.is_autocast_available(device):  # the meta device, for one
            return F.linear(x_TD.to(dtype), self.weight.to(dtype))
        with torch.autocast(device, enabled=False):
            return F.linear(x_TD.to(dtype), self.weight.to(dtype))


class Router(nn.Module):
    """Decides which experts each token goes to. Subclass it and write `forward(x_TD) -> Routing`.

    A subclass has `self.proj`, a linear map `(T, D) -> (T, E)` in float32 at least, `self.d_model`,
    `self.num_experts` and `self.top_k`. It knows nothing of processes or kernels.

    Attributes:
        takes_token_mask: a subclass that sets this gets `forward(x_TD, token_mask_T)` where the layer was given a
            token mask (bool, False tokens are zeros and must count in no loss). Any other router is then called with
            the True tokens alone, which on a GPU waits for the device to know how many they are.
    """

    takes_token_mask: ClassVar[bool] = False

    def __init__(self, d_model: int, num_experts: int, top_k: int = 2) -> None:
        super().__init__()
        self.d_model = check_int("d_model", d_model, 1)
        self.num_experts = check_int("num_experts", num_experts, 1)
        self.top_k = check_int("top_k", top_k, 1)
        if top_k > num_experts:
            raise ValueError(f"top_k must be at most num_experts, got top_k={top_k} of {num_experts} experts")
        self.proj = RouterLinear(d_model, num_experts)

    def reset_parameters(self) -> None:
        """Initialise the linear map as `nn.Linear` does."""
        self.proj.reset_parameters()

    def forward(self, x_TD: Tensor) -> Routing:
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
