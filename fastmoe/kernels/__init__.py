"""The kernels: pure functions on tensors, one contract, several backends.

    plan         sort routed rows by expert
    grouped_mm   one matrix product per expert
    expert_mlp   the whole routed MLP: gather, two products, activation, weighted sum
    combine      each token's weighted sum of its rows
    score_topk   scores of all experts, the K best and their weights

Shape letters stand in `fastmoe.kernels.contract`. Each function checks its arguments, follows `torch.autocast`, picks
a backend and calls it. `fastmoe.kernels.reference` is the ground truth.
"""

import torch
from torch import Tensor

from fastmoe._errors import unknown_name
from fastmoe.kernels.activations import ACTIVATIONS, activate, get_activation
from fastmoe.kernels.contract import Backend, Plan
from fastmoe.kernels.memory import empty_cache
from fastmoe.kernels.reference import accumulation_dtype, sigmoid_shares
from fastmoe.kernels.registry import BACKENDS, backends, check_backend, choose_backend

__all__ = [
    "ACTIVATIONS",
    "BACKENDS",
    "Backend",
    "Plan",
    "accumulation_dtype",
    "activate",
    "backends",
    "check_backend",
    "combine",
    "empty_cache",
    "expert_mlp",
    "get_activation",
    "grouped_mm",
    "plan",
    "score_topk",
    "sigmoid_shares",
]


def plan(expert_ids_N: Tensor, num_experts: int, *, backend: str = "auto") -> Plan:
    """Sort rows by expert.

    Args:
        expert_ids_N: int64 `(N,)`, each in 0..num_experts-1, or -1 for a row that is not computed.
        num_experts: number of experts, E.

    Returns:
        A `Plan`: `order_N` int64, `offsets_E` int32.

    Raises:
        ValueError: wrong shape or dtype; on a CPU also for an id out of range.
    """
    if expert_ids_N.dim() != 1 or expert_ids_N.dtype != torch.int64:
        raise ValueError(f"expert ids must be int64 (N,), got {expert_ids_N.dtype} {tuple(expert_ids_N.shape)}")
    return choose_backend(backend, "plan", expert_ids_N, num_experts).plan(expert_ids_N, num_experts)


def grouped_mm(
    rows_NI: Tensor, weight_EOI: Tensor, offsets_E: Tensor, bias_EO: Tensor | None = None, *, backend: str = "auto"
) -> Tensor:
    """`rows @ weight[e].T + bias[e]` for each expert's rows.

    Args:
        rows_NI: rows sorted by expert; those past `offsets_E[-1]` are not computed.
        weight_EOI: one `(out, in)` matrix per expert, as `nn.Linear.weight`.
        offsets_E: int32, where each expert's rows end.
        bias_EO: optional.

    Returns:
        `(N, O)`; rows that are not computed are zero.

    Raises:
        ValueError: shapes or dtypes that do not fit.
    """
    rows_NI, weight_EOI, bias_EO = _autocast(rows_NI, weight_EOI, bias_EO)
    _check_matrices(rows_NI, ("weight", weight_EOI, bias_EO))
    _check_experts(len(offsets_E), weight=weight_EOI)
    return choose_backend(backend, "grouped_mm", rows_NI, weight_EOI).grouped_mm(
        rows_NI, weight_EOI, bias_EO, offsets_E
    )


def expert_mlp(
    x_TD: Tensor,
    token_ids_N: Tensor,
    weights_N: Tensor,
    plan: Plan,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    *,
    activation: str,
    rows_per_token: int = 0,
    backend: str = "auto",
) -> Tensor:
    """The routed MLP: `y[t] = sum of weights[n] * (act(x[t] @ w1[e].T + b1[e]) @ w2[e].T + b2[e])` over t's rows n.

    Args:
        x_TD: tokens.
        token_ids_N: int64, the token of each routed row.
        weights_N: the weight of each routed row.
        plan: from `plan(expert_ids_N, E)`.
        w1, b1: `(E, H, D)` and `(E, H)`; for a gated activation `(E, 2H, D)` and `(E, 2H)`, gate half first.
        w2, b2: `(E, D, H)` and `(E, D)`.
        activation: a name in `ACTIVATIONS`.
        rows_per_token: K if the routed rows stand token by token, K for each; else 0. Only for speed.

    Returns:
        `(T, D)` in the dtype of `x_TD` (under autocast, in the autocast dtype). Backward keeps `x_TD` and the
        pre-activation, and recomputes the rest.

    Raises:
        ValueError: shapes or dtypes that do not fit, an unknown activation.
    """
    x_TD, w1, b1, w2, b2 = _autocast(x_TD, w1, b1, w2, b2)
    width = (1 + get_activation(activation).gated) * w2.shape[-1]
    if w1.dim() != 3 or w1.shape[1] != width:
        raise ValueError(
            f"w1 of a {activation} MLP must be (E, {width}, D) to fit w2 {tuple(w2.shape)}, got {tuple(w1.shape)}"
        )
    _check_matrices(x_TD, ("w1", w1, b1))
    _check_matrices(x_TD.new_empty(0, w2.shape[-1]), ("w2", w2, b2))
    _check_experts(len(plan.offsets_E), w1=w1, w2=w2)
    if w2.shape[1] != x_TD.shape[1]:
        raise ValueError(f"w2 must be (E, {x_TD.shape[1]}, H), got {tuple(w2.shape)}")
    _check_rows(plan, token_ids_N, weights_N)
    if rows_per_token and len(token_ids_N) != len(x_TD) * rows_per_token:
        rows = f"{len(x_TD)} tokens of {rows_per_token} rows each"
        raise ValueError(f"rows_per_token={rows_per_token} means {rows}, got {len(token_ids_N)} rows")
    return choose_backend(backend, "expert_mlp", x_TD, w1, w2).expert_mlp(
        x_TD, token_ids_N, weights_N, plan, w1, b1, w2, b2, activation, rows_per_token
    )


def combine(
    rows_NO: Tensor, token_ids_N: Tensor, weights_N: Tensor, plan: Plan, num_tokens: int, *, backend: str = "auto"
) -> Tensor:
    """Each token's weighted sum of its rows.

    Args:
        rows_NO: the experts' outputs, sorted by expert.
        token_ids_N: int64, the token of each routed row, in the rows' original order.
        weights_N: the weight of each routed row, in the rows' original order.
        plan: the plan that sorted the rows.
        num_tokens: T.

    Returns:
        `(T, O)` in the dtype of `rows_NO`, summed in float32 at least; a token without a row gets zeros.

    Raises:
        ValueError: shapes that do not fit.
    """
    if rows_NO.dim() != 2 or len(rows_NO) != len(token_ids_N):
        raise ValueError(f"rows must be ({len(token_ids_N)}, O), got {tuple(rows_NO.shape)}")
    _check_rows(plan, token_ids_N, weights_N)
    return choose_backend(backend, "combine", rows_NO).combine(rows_NO, token_ids_N, weights_N, plan, num_tokens)


def score_topk(
    logits_TE: Tensor, top_k: int, score_function: str = "softmax", *, normalize: bool = True, backend: str = "auto"
) -> tuple[Tensor, Tensor, Tensor]:
    """Scores of all experts, and the K best of each token with their weights.

    Args:
        logits_TE: float32 or float64; no autocast.
        top_k: K, 1..E.
        score_function: "softmax" or "sigmoid".
        normalize: weights are the chosen scores divided by their sum, else the scores themselves.

    Returns:
        `(scores_TE, weights_TK, expert_ids_TK)`, weights descending, ids int64. Both scores and weights are
        differentiable.

    Raises:
        ValueError: shapes, dtypes or a K that do not fit, an unknown score function.
    """
    if logits_TE.dim() != 2 or logits_TE.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"logits must be (T, E) in float32 or float64, got {logits_TE.dtype} {tuple(logits_TE.shape)}")
    if type(top_k) is not int or not 1 <= top_k <= logits_TE.shape[1]:
        raise ValueError(f"top_k must be a whole number from 1 to E = {logits_TE.shape[1]}, got {top_k!r}")
    if type(normalize) is not bool:
        raise ValueError(f"normalize must be True or False, got {normalize!r}")
    if score_function not in ("softmax", "sigmoid"):
        raise unknown_name("score_function", score_function, ["softmax", "sigmoid"])
    chosen = choose_backend(backend, "score_topk", logits_TE, top_k)
    return chosen.score_topk(logits_TE, top_k, score_function, normalize)


def _autocast(*tensors: Tensor | None) -> tuple:
    device = next(t for t in tensors if t is not None).device.type
    if not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(t if t is None or t.dtype == torch.float64 else t.to(dtype) for t in tensors)


def _check_matrices(rows_NI: Tensor, weight: tuple[str, Tensor, Tensor | None]) -> None:
    name, weight_EOI, bias_EO = weight
    if rows_NI.dim() != 2 or weight_EOI.dim() != 3 or rows_NI.shape[1] != weight_EOI.shape[2]:
        raise ValueError(f"{name} must be (E, O, {rows_NI.shape[-1]}), got {tuple(weight_EOI.shape)}")
    if bias_EO is not None and bias_EO.shape != weight_EOI.shape[:2]:
        raise ValueError(f"bias of {name} must be {tuple(weight_EOI.shape[:2])}, got {tuple(bias_EO.shape)}")
    if not rows_NI.dtype == weight_EOI.dtype == (weight_EOI if bias_EO is None else bias_EO).dtype:
        raise ValueError(f"rows are {rows_NI.dtype}, {name} is {weight_EOI.dtype}: they must have one dtype")


def _check_experts(num_experts: int, **weights: Tensor) -> None:
    for name, weight in weights.items():
        if len(weight) != num_experts:
            raise ValueError(f"{name} must have {num_experts} experts as the plan has, got {tuple(weight.shape)}")


def _check_rows(plan: Plan, token_ids_N: Tensor, weights_N: Tensor) -> None:
    for name, tensor in (("token ids", token_ids_N), ("weights", weights_N)):
        if tensor.shape != plan.order_N.shape:
            raise ValueError(f"{name} must be {tuple(plan.order_N.shape)}, one for each row, got {tuple(tensor.shape)}")
