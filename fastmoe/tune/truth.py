"""What a product's results must be: one plain product for each expert, in float32; and how far results are from it."""

from collections.abc import Iterator

import torch
from torch import Tensor

from fastmoe import kernels
from fastmoe.kernels.activations import activate_backward
from fastmoe.tune.work import Work


def truth(work: Work) -> list[Tensor]:
    """As `work.by(tile)` has it."""
    kind, activation = work.problem.kind, work.case.activation
    weight_N = work.rows.weight_N
    if kind == "forward":
        pre_NW = _products(work, _gathered(work), turned=False)
        hidden_NH = kernels.activate(activation, pre_NW)
        return [hidden_NH] if work.case.decode else [hidden_NH, pre_NW]
    if kind == "product":
        return [_summed(work, _products(work, work.rows_N, turned=False) * weight_N[:, None])]
    if kind == "turned":
        return [_summed(work, _products(work, work.rows_N, turned=True))]
    if kind == "backward":
        dhidden_NH, pre_NW = _products(work, _gathered(work), turned=True), work.rows_N.float()
        hidden_NH = kernels.activate(activation, pre_NW)
        dpre_NW = activate_backward(activation, dhidden_NH * weight_N[:, None], pre_NW)
        return [dpre_NW, hidden_NH * weight_N[:, None], (hidden_NH * dhidden_NH).sum(1)]
    a, b = _gathered(work), work.rows_N
    if work.problem.outputs != work.case.d_model:
        a, b = b, a
    return [torch.stack([a[own].float().t() @ b[own].float() for own in _experts(work)])]


def _experts(work: Work) -> Iterator[slice]:
    """Each expert's rows."""
    ends = work.grid.offsets_E.tolist()
    return map(slice, [0, *ends[:-1]], ends)


def _gathered(work: Work) -> Tensor:
    return work.tokens_TD[work.rows.token_N.long()]


def _products(work: Work, rows: Tensor, turned: bool) -> Tensor:
    matrices = work.w_EOI if turned else work.w_EOI.transpose(1, 2)
    return torch.cat([rows[own].float() @ w.float() for own, w in zip(_experts(work), matrices, strict=True)])


def _summed(work: Work, rows_ND: Tensor) -> Tensor:
    y_TD = rows_ND.new_zeros(work.case.num_tokens, rows_ND.shape[1])
    return y_TD.index_add_(0, work.rows.token_N.long(), rows_ND)


def worst_error(got: list[Tensor], expected: list[Tensor]) -> float:
    """The largest error of a row, by the norm of that row or of a typical one; NaN where there is one."""
    return float(torch.stack([_worst_row(g, e) for g, e in zip(got, expected, strict=True)]).max())


def _worst_row(got: Tensor, expected: Tensor) -> Tensor:
    if got.shape != expected.shape:
        raise ValueError(f"shape {tuple(got.shape)}, expected {tuple(expected.shape)}")
    sizes = expected.norm(dim=-1)
    typical = sizes.square().mean().sqrt().clamp(min=1e-30)
    return ((got.float() - expected).norm(dim=-1) / sizes.clamp(min=typical)).max()
