"""The activations that the fused kernels know: forward, and backward from the pre-activation alone."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from fastmoe._errors import unknown_name

aten = torch.ops.aten


@dataclass(frozen=True)
class Activation:
    """`forward(z)`, `backward(grad, z)`, and `forward_(z)` in place, elementwise; if gated, `forward(gate) * up`.

    The pre-activation of a gated activation is `(rows, 2H)`, gate half first, else `(rows, H)`.
    """

    forward: Callable[[Tensor], Tensor]
    backward: Callable[[Tensor, Tensor], Tensor]
    forward_: Callable[[Tensor], Tensor]
    gated: bool = False


def _gelu_tanh(z: Tensor) -> Tensor:
    return F.gelu(z, approximate="tanh")


def _gelu_tanh_(z: Tensor) -> Tensor:
    return aten.gelu_(z, approximate="tanh")


def _relu_backward(grad: Tensor, z: Tensor) -> Tensor:
    return aten.threshold_backward(grad, z, 0)


def _gelu_backward(grad: Tensor, z: Tensor) -> Tensor:
    return aten.gelu_backward(grad, z)


def _gelu_tanh_backward(grad: Tensor, z: Tensor) -> Tensor:
    return aten.gelu_backward(grad, z, approximate="tanh")


def _silu_backward(grad: Tensor, z: Tensor) -> Tensor:
    return aten.silu_backward(grad, z)


ACTIVATIONS: dict[str, Activation] = {
    "relu": Activation(F.relu, _relu_backward, torch.relu_),
    "gelu": Activation(F.gelu, _gelu_backward, aten.gelu_),
    "gelu_tanh": Activation(_gelu_tanh, _gelu_tanh_backward, _gelu_tanh_),
    "silu": Activation(F.silu, _silu_backward, aten.silu_),
    "reglu": Activation(F.relu, _relu_backward, torch.relu_, gated=True),
    "geglu": Activation(F.gelu, _gelu_backward, aten.gelu_, gated=True),
    "geglu_tanh": Activation(_gelu_tanh, _gelu_tanh_backward, _gelu_tanh_, gated=True),
    "swiglu": Activation(F.silu, _silu_backward, aten.silu_, gated=True),
}


def get_activation(name: str) -> Activation:
    """The table's row; `ValueError` with the nearest known name otherwise."""
    if name not in ACTIVATIONS:
        raise unknown_name("activation", name, ACTIVATIONS)
    return ACTIVATIONS[name]


def activate(name: str, pre: Tensor) -> Tensor:
    """Hidden activations `(rows, H)` from the pre-activation `(rows, H)`, gated `(rows, 2H)`."""
    activation = get_activation(name)
    if not activation.gated:
        return activation.forward(pre)
    gate, up = pre.chunk(2, dim=-1)
    return activation.forward(gate) * up


def activate_(name: str, pre: Tensor) -> Tensor:
    """`activate`, written into the memory of `pre`."""
    activation = get_activation(name)
    if not activation.gated:
        return activation.forward_(pre)
    gate, up = pre.chunk(2, dim=-1)
    return activation.forward_(gate).mul_(up)


def activate_backward(name: str, grad: Tensor, pre: Tensor) -> Tensor:
    """Gradient of the pre-activation, shaped like `pre`, from the gradient of the hidden activations."""
    activation = get_activation(name)
    if not activation.gated:
        return activation.backward(grad, pre)
    gate, up = pre.chunk(2, dim=-1)
    return torch.cat([activation.backward(grad * up, gate), grad * activation.forward(gate)], dim=-1)
