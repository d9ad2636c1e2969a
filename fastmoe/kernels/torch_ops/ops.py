"""`torch.library` operators: opaque to `torch.compile`, with shapes that depend on the arguments' shapes alone.

Where an operator returns a tensor that was not asked for, it is empty.
"""

import torch
from torch import Tensor

from fastmoe.kernels.contract import ids_out_of_range
from fastmoe.kernels.native import mlp as native_mlp
from fastmoe.kernels.native.choice import hands_over
from fastmoe.kernels.native.library import usable
from fastmoe.kernels.torch_ops.layout import Layout, choose_layout
from fastmoe.kernels.torch_ops.mlp import Experts, Route, mlp_backward, mlp_forward


def given(grads: list[Tensor | None], like: Tensor) -> list[Tensor]:
    return [like.new_empty(0) if grad is None else grad for grad in grads]


def refuse_double_backward(op: torch.library.CustomOpDef) -> None:
    def backward(ctx: object, *grads: object) -> None:
        raise RuntimeError("fastmoe's kernels have no second derivative; use backend='reference' for double backward")

    op.register_autograd(backward)


@torch.library.custom_op("fastmoe::plan", mutates_args=())
def plan(expert_ids_N: Tensor, num_experts: int, by: str) -> tuple[Tensor, Tensor]:
    """`(order_N int64, offsets_E int32)`: a stable sort by expert, id -1 last."""
    if by == "triton":
        from fastmoe.kernels.triton.sort import sort_rows

        return sort_rows(expert_ids_N, num_experts)
    if by == "native" and usable():
        return native_mlp.sort_rows(expert_ids_N, num_experts)
    keys_N = torch.where(expert_ids_N == -1, num_experts, expert_ids_N)
    order_N = torch.argsort(keys_N, stable=True)
    if keys_N.device.type == "cpu":
        if expert_ids_N.numel() and (expert_ids_N.min() < -1 or expert_ids_N.max() >= num_experts):
            raise ids_out_of_range(expert_ids_N, num_experts)
        counts = torch.bincount(keys_N, minlength=num_experts + 1)
    else:  # bincount would wait for the device to know its output's size
        counts = torch.zeros(num_experts + 1, dtype=torch.int64, device=keys_N.device)
        counts.scatter_add_(0, keys_N, torch.ones_like(keys_N))
    return order_N, counts[:-1].cumsum(0).to(torch.int32)


@plan.register_fake
def _(expert_ids_N: Tensor, num_experts: int, by: str) -> tuple[Tensor, Tensor]:
    return expert_ids_N.new_empty(expert_ids_N.shape), expert_ids_N.new_empty(num_experts, dtype=torch.int32)


@torch.library.custom_op("fastmoe::grouped_mm", mutates_args=())
def grouped_mm(rows_NI: Tensor, weight_EOI: Tensor, bias_EO: Tensor | None, offsets_E: Tensor, by: str) -> Tensor:
    if by == "triton":
        from fastmoe.kernels.triton import mlp as triton_mlp

        return triton_mlp.grouped_mm(rows_NI, weight_EOI, bias_EO, offsets_E)
    layout = choose_layout(len(rows_NI), offsets_E, weight_EOI)
    return layout.take(layout.mm(layout.put(rows_NI), weight_EOI, bias_EO))


@grouped_mm.register_fake
def _(rows_NI: Tensor, weight_EOI: Tensor, bias_EO: Tensor | None, offsets_E: Tensor, by: str) -> Tensor:
    return rows_NI.new_empty(rows_NI.shape[0], weight_EOI.shape[1])


@torch.library.custom_op("fastmoe::grouped_mm_backward", mutates_args=())
def grouped_mm_backward(
    grad_NO: Tensor, rows_NI: Tensor, weight_EOI: Tensor, offsets_E: Tensor, by: str, needed: list[bool]
) -> list[Tensor]:
    """Gradients of rows, weight and bias."""
    if by == "triton":
        from fastmoe.kernels.triton import mlp as triton_mlp

        return given(triton_mlp.grouped_mm_backward(grad_NO, rows_NI, weight_EOI, offsets_E, needed), grad_NO)
    layout = choose_layout(len(rows_NI), offsets_E, weight_EOI)
    grad_SO = layout.put(grad_NO)
    grads = [
        layout.take(layout.mm_transposed(grad_SO, weight_EOI)) if needed[0] else None,
        _weight_grad(layout, grad_SO, layout.put(rows_NI), weight_EOI) if needed[1] else None,
        layout.bias_grad(grad_SO) if needed[2] else None,
    ]
    return given(grads, grad_NO)


def _weight_grad(layout: Layout, grad_SO: Tensor, rows_SI: Tensor, weight_EOI: Tensor) -> Tensor:
    """`(E, O, I)`, stored as the weight is: autograd would copy a gradient that lies otherwise."""
    if _is_transposed(weight_EOI):
        return layout.weight_grad(rows_SI, grad_SO).transpose(1, 2)
    return layout.weight_grad(grad_SO, rows_SI)


def _is_transposed(weight_EOI: Tensor) -> bool:
    return not weight_EOI.is_contiguous() and weight_EOI.transpose(1, 2).is_contiguous()


@grouped_mm_backward.register_fake
def _(grad_NO, rows_NI, weight_EOI, offsets_E, by, needed):  # type: ignore[no-untyped-def]
    transposed = by != "triton" and _is_transposed(weight_EOI)
    grad_EOI = torch.empty_like(weight_EOI) if transposed else weight_EOI.new_empty(weight_EOI.shape)
    grads = [rows_NI.new_empty(rows_NI.shape), grad_EOI, weight_EOI.new_empty(weight_EOI.shape[:2])]
    return [grad if need else grad.new_empty(0) for grad, need in zip(grads, needed, strict=True)]


refuse_double_backward(grouped_mm_backward)


def _grouped_mm_setup(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    rows_NI, weight_EOI, _bias_EO, offsets_E, ctx.by = inputs
    ctx.save_for_backward(rows_NI, weight_EOI, offsets_E)
    ctx.needed = list(ctx.needs_input_grad[:3])


def _grouped_mm_backward(ctx, grad_NO: Tensor):  # type: ignore[no-untyped-def]
    grads = grouped_mm_backward(grad_NO.contiguous(), *ctx.saved_tensors, ctx.by, ctx.needed)
    return *(g if need else None for g, need in zip(grads, ctx.needed, strict=True)), None, None


grouped_mm.register_autograd(_grouped_mm_backward, setup_context=_grouped_mm_setup)


def _is_native(x_TD: Tensor, w2: Tensor, order_N: Tensor) -> bool:
    return usable() and not hands_over(x_TD.dtype, len(order_N), *w2.shape)


@torch.library.custom_op("fastmoe::expert_mlp", mutates_args=())
def expert_mlp(
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
    rows_per_token: int,
    by: str,
    keep: bool,
) -> tuple[Tensor, Tensor]:
    """`(y_TD, pre_NH)`; the pre-activations are what backward needs, empty unless `keep`.

    `by`: the backend; "native" means the compiled library, where there is one and it is faster. A pass and its
    backward must say the same.
    """
    if by == "triton":
        from fastmoe.kernels.triton import mlp as triton_mlp

        rest = (token_ids_N, order_N, offsets_E, activation, rows_per_token, keep)
        return triton_mlp.mlp_forward(x_TD, weights_N, w1, b1, w2, b2, *rest)
    if by == "native" and _is_native(x_TD, w2, order_N):
        rows = (token_ids_N, order_N, offsets_E)
        return native_mlp.mlp_forward(x_TD, weights_N, w1, b1, w2, b2, *rows, activation, keep)
    route = Route.build(x_TD, token_ids_N, weights_N, order_N, offsets_E, w1, rows_per_token)
    return mlp_forward(route, x_TD, Experts(w1, b1, w2, b2, activation), keep)


@expert_mlp.register_fake
def _(x_TD, weights_N, w1, *rest):  # type: ignore[no-untyped-def]
    order_N, keep = rest[4], rest[-1]
    return x_TD.new_empty(x_TD.shape), x_TD.new_empty((order_N.shape[0], w1.shape[1]) if keep else (0,))


@torch.library.custom_op("fastmoe::expert_mlp_backward", mutates_args=())
def expert_mlp_backward(
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
    rows_per_token: int,
    by: str,
    needed: list[bool],
) -> list[Tensor]:
    """Gradients of x, weights, w1, b1, w2, b2."""
    if by == "triton":
        from fastmoe.kernels.triton import mlp as triton_mlp

        rest = (token_ids_N, order_N, offsets_E, pre_NH, activation, rows_per_token, needed)
        return given(triton_mlp.mlp_backward(grad_TD, x_TD, weights_N, w1, b1, w2, b2, *rest), grad_TD)
    if by == "native" and _is_native(x_TD, w2, order_N):
        rows = (token_ids_N, order_N, offsets_E)
        grads = native_mlp.mlp_backward(grad_TD, x_TD, weights_N, w1, b1, w2, b2, *rows, pre_NH, activation, needed)
        return given(grads, grad_TD)
    route = Route.build(x_TD, token_ids_N, weights_N, order_N, offsets_E, w1, rows_per_token)
    experts = Experts(w1, b1, w2, b2, activation)
    return given(mlp_backward(route, grad_TD, x_TD, pre_NH, experts, needed), grad_TD)


@expert_mlp_backward.register_fake
def _(grad_TD, x_TD, weights_N, w1, b1, w2, b2, *route):  # type: ignore[no-untyped-def]
    needed = route[-1]
    return [
        g.new_empty(g.shape) if need and g is not None else grad_TD.new_empty(0)
        for g, need in zip((x_TD, weights_N, w1, b1, w2, b2), needed, strict=True)
    ]


refuse_double_backward(expert_mlp_backward)


def _expert_mlp_setup(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    *tensors, ctx.activation, ctx.rows_per_token, ctx.by, _keep = inputs
    ctx.save_for_backward(*tensors, output[1])
    ctx.needed = list(ctx.needs_input_grad[:6])
    ctx.set_materialize_grads(False)


def _expert_mlp_backward(ctx, grad_TD: Tensor | None, _grad_pre: Tensor | None):  # type: ignore[no-untyped-def]
    if grad_TD is None:
        return (None,) * 13
    grads = expert_mlp_backward(
        grad_TD.contiguous(), *ctx.saved_tensors, ctx.activation, ctx.rows_per_token, ctx.by, ctx.needed
    )
    return *(g if need else None for g, need in zip(grads, ctx.needed, strict=True)), *(None,) * 7


expert_mlp.register_autograd(_expert_mlp_backward, setup_context=_expert_mlp_setup)
