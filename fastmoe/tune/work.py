"""One product, by any tile or by `F.grouped_mm`, with the kernels that stand around it and depend on which it is.

Those are gather and activation, which `F.grouped_mm` leaves to others, and combine, which adds up the parts of a split
reduction. Letters as in `fastmoe.kernels.triton`.
"""

import torch
from torch import Tensor

from fastmoe import kernels
from fastmoe.kernels.torch_ops.layout import grouped_mm_fits
from fastmoe.kernels.triton.combine import combine, lists_of
from fastmoe.kernels.triton.steps import Grid, activated_product, activation_product, plain_product, weight_product
from fastmoe.kernels.triton.tiles import Tile
from fastmoe.tune.problems import Case


class Work:
    """A case's tensors: tokens `(T, D)`, rows `(N, width)` in sorted order, stacked matrices, routing at random."""

    def __init__(self, case: Case, device: torch.device) -> None:
        self.case, self.problem = case, case.problem
        self.generator = torch.Generator(device).manual_seed(0)
        p, T, D, K = case.problem, case.num_tokens, case.d_model, case.top_k
        scores_TE = torch.randn(T, p.num_experts, generator=self.generator, device=device)
        weights_TK, ids_TK = scores_TE.softmax(1).topk(K)
        self.token_ids_N = torch.arange(T, device=device).repeat_interleave(K)
        plan = kernels.plan(ids_TK.reshape(-1), p.num_experts, backend="triton")
        self.grid = Grid(plan.offsets_E, p.num_rows)
        self.rows = self.grid.rows(plan.order_N, self.token_ids_N, weights_TK.reshape(-1), T, None)
        self.tokens_TD = self._randn(T, D)
        width = p.outputs + p.inputs - D
        self.rows_N = self._randn(p.num_rows, width * (1 + p.gated) if p.kind == "backward" else width)
        self.w_EOI = self._randn(p.num_experts, p.outputs, p.inputs).div_(p.inputs**0.5)

    def _randn(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator, device=self.generator.device, dtype=self.problem.dtype)

    def takes_grouped_mm(self) -> bool:
        return self.problem.dtype == torch.bfloat16 and grouped_mm_fits(self.w_EOI)

    def by(self, tile: Tile | None) -> list[Tensor]:
        """The product's results; None: by `F.grouped_mm`."""
        return getattr(self, f"_{self.problem.kind}")(tile)

    def _combine(self, parts_SND: Tensor, weight_N: Tensor | None) -> list[Tensor]:
        T = self.case.num_tokens
        lists = lists_of(self.token_ids_N, T, self.case.top_k)
        position_N, offsets_E = self.rows.position_N, self.grid.offsets_E
        return [combine(parts_SND, position_N, weight_N, offsets_E, T, lists, self.problem.dtype)]

    def _forward(self, tile: Tile | None) -> list[Tensor]:
        keep = not self.case.decode
        arguments = (self.tokens_TD, self.rows.token_N, self.w_EOI, None, self.case.activation)
        made = activated_product(*arguments, self.grid, tile, keep)
        return list(made) if keep else [made[0]]

    def _product(self, tile: Tile | None) -> list[Tensor]:
        return self._combine(plain_product(self.rows_N, self.w_EOI, None, self.grid, tile), self.rows.weight_N)

    def _turned(self, tile: Tile | None) -> list[Tensor]:
        return self._combine(plain_product(self.rows_N, self.w_EOI, None, self.grid, tile, turned=True), None)

    def _backward(self, tile: Tile | None) -> list[Tensor]:
        """Gradient of the pre-activations, weighted hidden activations, gradient of the weights."""
        arguments = (self.tokens_TD, self.rows, self.w_EOI, self.rows_N, self.case.activation)
        dpre_NW, hidden_NH, dots_CN = activation_product(*arguments, self.grid, tile, True)
        assert hidden_NH is not None
        return [dpre_NW, hidden_NH, dots_CN.sum(0)]

    def _weight(self, tile: Tile | None) -> list[Tensor]:
        """Of w2, whose `a` is gathered, or of w1, whose `b` is."""
        tokens, rows = (self.tokens_TD, self.rows.token_N), (self.rows_N, None)
        (a, a_index), (b, b_index) = (tokens, rows) if self.problem.outputs == self.case.d_model else (rows, tokens)
        return [weight_product(a, a_index, b, b_index, self.grid, tile)[0]]
