"""The plan and the routed MLP through the compiled library: what the library is given, and where its results go."""

import ctypes
from collections.abc import Callable, Sequence
from functools import cache

import torch
from torch import Tensor

from fastmoe.kernels.activations import get_activation
from fastmoe.kernels.contract import ids_out_of_range
from fastmoe.kernels.memory import new_buffer
from fastmoe.kernels.native.library import load

_ACTIVATIONS = {"relu": 0, "gelu": 1, "gelu_tanh": 2, "silu": 3, "reglu": 0, "geglu": 1, "geglu_tanh": 2, "swiglu": 3}
_SIZES = ["T", "D", "H", "E", "N", "bfloat16", "gated", "activation", "threads", "amx"]
_TENSORS = ["x", "token_ids", "weights", "order", "ends", "w1", "b1", "w2", "b2", "pre", "y"]
_GRADS = ["grad", "dx", "dweights", "dw1", "db1", "dw2", "db2", "scratch"]


class Problem(ctypes.Structure):
    """`struct Problem` of expert_mlp.cpp."""

    _fields_ = [(n, ctypes.c_int64) for n in _SIZES] + [(n, ctypes.c_void_p) for n in _TENSORS + _GRADS]

    def point(self, **tensors: Tensor | None) -> None:
        for name, tensor in tensors.items():
            setattr(self, name, None if tensor is None else tensor.data_ptr())


def refusal(x_TD: Tensor, hidden: int) -> str | None:
    """Why tokens like these, with experts of this hidden width, are not served."""
    if x_TD.dtype not in (torch.float32, torch.bfloat16):
        return f"it knows float32 and bfloat16, got {x_TD.dtype}"
    multiple = 64 // x_TD.element_size()
    if x_TD.shape[1] % multiple or hidden % multiple:
        return f"widths must be multiples of {multiple} in {x_TD.dtype}, got D {x_TD.shape[1]} and H {hidden}"
    return None


def sort_rows(expert_ids_N: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """`(order_N, offsets_E)` of a `Plan`."""
    expert_ids_N = expert_ids_N.contiguous()
    order_N, offsets_E = torch.empty_like(expert_ids_N), expert_ids_N.new_empty(num_experts, dtype=torch.int32)
    sizes = (len(expert_ids_N), num_experts)
    if not _library().fastmoe_plan(expert_ids_N.data_ptr(), *sizes, order_N.data_ptr(), offsets_E.data_ptr()):
        raise ids_out_of_range(expert_ids_N, num_experts)
    return order_N, offsets_E


def mlp_forward(
    x_TD: Tensor,
    weights_N: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    token_ids_N: Tensor,
    order_N: Tensor,
    offsets_E: Tensor,
    activation: str,
    keep: bool,
) -> tuple[Tensor, Tensor]:
    """`(y_TD, pre_NH)`: the output, and the pre-activations as backward wants them, empty unless `keep`."""
    given = _contiguous(x_TD, weights_N, w1, b1, w2, b2, token_ids_N, order_N, offsets_E)
    y_TD = new_buffer(x_TD, *x_TD.shape)
    pre_NH = new_buffer(x_TD, len(order_N) if keep else 0, w1.shape[1])
    problem = _problem(given, activation)
    problem.point(y=y_TD, pre=pre_NH if keep else None)
    _run(_library().fastmoe_forward, problem)
    return y_TD, pre_NH if keep else pre_NH.flatten()


def mlp_backward(
    grad_TD: Tensor,
    x_TD: Tensor,
    weights_N: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    token_ids_N: Tensor,
    order_N: Tensor,
    offsets_E: Tensor,
    pre_NH: Tensor,
    activation: str,
    needed: Sequence[bool],
) -> list[Tensor | None]:
    """Gradients of x, weights, w1, b1, w2, b2, in this order; None where `needed` is False."""
    given = _contiguous(x_TD, weights_N, w1, b1, w2, b2, token_ids_N, order_N, offsets_E)
    grads = [
        new_buffer(t, *t.shape) if need and t is not None else None for t, need in zip(given, needed, strict=False)
    ]
    problem = _problem(given, activation)
    grad_TD = grad_TD.contiguous()
    problem.point(
        grad=grad_TD, pre=pre_NH, **dict(zip(("dx", "dweights", "dw1", "db1", "dw2", "db2"), grads, strict=True))
    )
    _run(_library().fastmoe_backward, problem)
    if grads[1] is not None:
        grads[1] = grads[1].to(weights_N.dtype)
    return grads


def _contiguous(x_TD: Tensor, weights_N: Tensor, *others: Tensor | None) -> list[Tensor | None]:
    return [None if t is None else t.contiguous() for t in (x_TD, weights_N.float(), *others)]


def _problem(given: Sequence[Tensor | None], activation: str) -> Problem:
    x_TD, weights_N, w1, b1, w2, b2, token_ids_N, order_N, offsets_E = given
    assert x_TD is not None
    assert w2 is not None
    assert order_N is not None
    bfloat16 = x_TD.dtype == torch.bfloat16
    problem = Problem(
        *x_TD.shape,
        w2.shape[2],
        len(w2),
        len(order_N),
        bfloat16,
        get_activation(activation).gated,
        _ACTIVATIONS[activation],
        torch.get_num_threads(),
        bfloat16 and _amx(),
    )
    problem.point(x=x_TD, weights=weights_N, w1=w1, b1=b1, w2=w2, b2=b2)
    problem.point(token_ids=token_ids_N, order=order_N, ends=offsets_E)
    return problem


def _run(function: Callable[[object, int], int], problem: Problem) -> None:
    size = function(ctypes.byref(problem), 0)
    if size == 0:
        raise ValueError(
            f"token ids must be in 0..{problem.T - 1} and the plan must be one of {problem.N} rows for "
            f"{problem.E} experts"
        )
    scratch = new_buffer(torch.empty(0, dtype=torch.uint8), size + 64)
    problem.scratch = (scratch.data_ptr() + 63) // 64 * 64
    function(ctypes.byref(problem), 1)


def _library() -> ctypes.CDLL:
    library = load()
    assert isinstance(library, ctypes.CDLL), library
    return library


@cache
def _amx() -> bool:
    return bool(_library().fastmoe_amx())
