"""`torch.library` operators that Triton alone has a kernel for; the others are in `fastmoe.kernels.torch_ops.ops`.

What imports Triton is imported when it is first needed.
"""

import torch
from torch import Tensor

from fastmoe.kernels.torch_ops.ops import given, refuse_double_backward


@torch.library.custom_op("fastmoe::combine", mutates_args=())
def combine(
    rows_NO: Tensor, weights_N: Tensor, token_ids_N: Tensor, order_N: Tensor, offsets_E: Tensor, num_tokens: int
) -> Tensor:
    """Each token's weighted sum of its rows; `order_N` and `offsets_E` are a plan's."""
    from fastmoe.kernels.triton.mlp import combine_rows

    return combine_rows(rows_NO, token_ids_N, weights_N, order_N, offsets_E, num_tokens)


@combine.register_fake
def _(rows_NO, weights_N, token_ids_N, order_N, offsets_E, num_tokens):
    return rows_NO.new_empty(num_tokens, rows_NO.shape[1])


@torch.library.custom_op("fastmoe::combine_backward", mutates_args=())
def combine_backward(
    grad_TO: Tensor,
    rows_NO: Tensor,
    weights_N: Tensor,
    token_ids_N: Tensor,
    order_N: Tensor,
    offsets_E: Tensor,
    needed: list[bool],
) -> list[Tensor]:
    """Gradients of rows and weights."""
    from fastmoe.kernels.triton.mlp import combine_rows_backward

    args = (grad_TO, rows_NO, token_ids_N, weights_N, order_N, offsets_E, needed)
    return given(combine_rows_backward(*args), grad_TO)


@combine_backward.register_fake
def _(grad_TO, rows_NO, weights_N, token_ids_N, order_N, offsets_E, needed):
    pairs = zip((rows_NO, weights_N), needed, strict=True)
    return [t.new_empty(t.shape) if need else grad_TO.new_empty(0) for t, need in pairs]


refuse_double_backward(combine_backward)


def _combine_setup(ctx, inputs, output) -> None:
    *tensors, _num_tokens = inputs
    ctx.save_for_backward(*tensors)
    ctx.needed = list(ctx.needs_input_grad[:2])


def _combine_backward(ctx, grad_TO: Tensor):
    grads = combine_backward(grad_TO.contiguous(), *ctx.saved_tensors, ctx.needed)
    return *(g if need else None for g, need in zip(grads, ctx.needed, strict=True)), *(None,) * 4


combine.register_autograd(_combine_backward, setup_context=_combine_setup)


@torch.library.custom_op("fastmoe::score_topk", mutates_args=())
def score_topk(logits_TE: Tensor, top_k: int, softmax: bool, normalize: bool) -> tuple[Tensor, Tensor, Tensor]:
    """`(scores_TE, weights_TK, expert_ids_TK)`, in float32."""
    from fastmoe.kernels.triton import score

    return score.score_topk(logits_TE.contiguous(), top_k, softmax, normalize)


@score_topk.register_fake
def _(logits_TE: Tensor, top_k: int, softmax: bool, normalize: bool) -> tuple[Tensor, Tensor, Tensor]:
    shape_TK = (logits_TE.shape[0], top_k)
    ids_TK = logits_TE.new_empty(shape_TK, dtype=torch.int64)
    return logits_TE.new_empty(logits_TE.shape), logits_TE.new_empty(shape_TK), ids_TK


@torch.library.custom_op("fastmoe::score_topk_backward", mutates_args=())
def score_topk_backward(
    dscores_TE: Tensor,
    dweights_TK: Tensor,
    logits_TE: Tensor,
    scores_TE: Tensor,
    weights_TK: Tensor,
    expert_ids_TK: Tensor,
    softmax: bool,
    normalize: bool,
) -> Tensor:
    """The gradient of the logits."""
    from fastmoe.kernels.triton import score

    grads = (dscores_TE.contiguous(), dweights_TK.contiguous())
    return score.score_topk_backward(
        *grads, logits_TE.contiguous(), scores_TE, weights_TK, expert_ids_TK, softmax, normalize
    )


@score_topk_backward.register_fake
def _(dscores_TE, dweights_TK, logits_TE, *rest):
    return logits_TE.new_empty(logits_TE.shape)


refuse_double_backward(score_topk_backward)


def _score_topk_setup(ctx, inputs, output) -> None:
    logits_TE, _top_k, ctx.softmax, ctx.normalize = inputs
    ctx.save_for_backward(logits_TE, *output)
    ctx.mark_non_differentiable(output[2])


def _score_topk_backward(ctx, dscores_TE: Tensor, dweights_TK: Tensor, _dids: Tensor | None):
    return (
        score_topk_backward(dscores_TE, dweights_TK, *ctx.saved_tensors, ctx.softmax, ctx.normalize),
        None,
        None,
        None,
    )


score_topk.register_autograd(_score_topk_backward, setup_context=_score_topk_setup)
