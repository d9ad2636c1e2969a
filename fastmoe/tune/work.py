"""One product, by any tile or by `F.grouped_mm`, with the kernels that stand around it and depend on which it is.

Those are gather and activation, which `F.grouped_mm` leaves to others, and combine, which adds up the parts of a split
reduction. Letters as in `fastmoe.kernels.triton`.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from fastmoe import kernels
from fastmoe.kernels.torch_ops.layout import grouped_mm_fits
from fastmoe.kernels.triton.activation import activate, activate_backward
from fastmoe.kernels.triton.combine import combine, lists_of
from fastmoe.kernels.triton.prepare import Tiles, prepare, tiles_of
from fastmoe.kernels.triton.product import backward, forward, product
from fastmoe.kernels.triton.tiles import Tile
from fastmoe.kernels.triton.weight_grad import weight_grad
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
        self.offsets_E = plan.offsets_E
        self.rows, _ = prepare(plan.order_N, plan.offsets_E, self.token_ids_N, weights_TK.reshape(-1), T, 128)
        self.tokens_TD = self._randn(T, D)
        width = p.outputs + p.inputs - D
        self.rows_N = self._randn(p.num_rows, width * (1 + p.gated) if p.kind == "backward" else width)
        self.w_EOI = self._randn(p.num_experts, p.outputs, p.inputs).div_(p.inputs**0.5)
        self.made: dict[int, Tiles] = {}

    def _randn(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator, device=self.generator.device, dtype=self.problem.dtype)

    def takes_grouped_mm(self) -> bool:
        return self.problem.dtype == torch.bfloat16 and grouped_mm_fits(self.w_EOI)

    def by(self, tile: Tile | None) -> list[Tensor]:
        """The product's results; None: by `F.grouped_mm`."""
        return getattr(self, f"_{self.problem.kind}")(tile)

    def _tiles(self, tile: Tile) -> Tiles:
        if tile.rows not in self.made:
            self.made[tile.rows] = tiles_of(self.offsets_E, self.problem.num_rows, tile.rows)
        return self.made[tile.rows]

    def _gather(self) -> Tensor:
        return self.tokens_TD.index_select(0, self.rows.token_N)

    def _combine(self, parts_SND: Tensor, weight_N: Tensor | None) -> list[Tensor]:
        T = self.case.num_tokens
        lists = lists_of(self.token_ids_N, T, self.case.top_k)
        return [combine(parts_SND, self.rows.position_N, weight_N, self.offsets_E, T, lists, self.problem.dtype)]

    def _forward(self, tile: Tile | None) -> list[Tensor]:
        activation, keep = self.case.activation, not self.case.decode
        if tile is not None and tile.split == 1:
            made = forward(
                self.tokens_TD, self.rows.token_N, self.w_EOI, None, activation, self._tiles(tile), tile, keep
            )
        else:
            if tile is None:
                parts_SNW = F.grouped_mm(self._gather(), self.w_EOI.transpose(1, 2), offs=self.offsets_E)[None]
            else:
                parts_SNW = product(self.tokens_TD, self.rows.token_N, self.w_EOI, None, self._tiles(tile), tile)
            made = activate(parts_SNW, self.offsets_E, activation, self.problem.dtype, keep)
        return list(made) if keep else [made[0]]

    def _product(self, tile: Tile | None) -> list[Tensor]:
        if tile is None:
            parts_SND = F.grouped_mm(self.rows_N, self.w_EOI.transpose(1, 2), offs=self.offsets_E)[None]
        else:
            parts_SND = product(self.rows_N, None, self.w_EOI, None, self._tiles(tile), tile)
        return self._combine(parts_SND, self.rows.weight_N)

    def _turned(self, tile: Tile | None) -> list[Tensor]:
        if tile is None:
            parts_SND = F.grouped_mm(self.rows_N, self.w_EOI, offs=self.offsets_E)[None]
        else:
            parts_SND = product(self.rows_N, None, self.w_EOI, None, self._tiles(tile), tile, turned=True)
        return self._combine(parts_SND, None)

    def _backward(self, tile: Tile | None) -> list[Tensor]:
        """Gradient of the pre-activations, weighted hidden activations, gradient of the weights."""
        around = (self.rows_N, self.rows.weight_N)
        activation = self.case.activation
        if tile is None:
            dhidden_NH = F.grouped_mm(self._gather(), self.w_EOI, offs=self.offsets_E)
            dpre_NW, hidden_NH, dots_CN = activate_backward(dhidden_NH, *around, self.offsets_E, activation, True)
        else:
            dpre_NW, hidden_NH, dots_CN = backward(
                self.tokens_TD, self.rows.token_N, self.w_EOI, *around, activation, self._tiles(tile), tile, True
            )
        assert hidden_NH is not None
        return [dpre_NW, hidden_NH, dots_CN.sum(0)]

    def _weight(self, tile: Tile | None) -> list[Tensor]:
        """Of w2, whose `a` is gathered, or of w1, whose `b` is."""
        a_gathered = self.problem.outputs == self.case.d_model
        if tile is None:
            a, b = (self._gather(), self.rows_N) if a_gathered else (self.rows_N, self._gather())
            return [F.grouped_mm(a.t(), b, offs=self.offsets_E)]
        tokens, rows = (self.tokens_TD, self.rows.token_N), (self.rows_N, None)
        a, a_index, b, b_index = (*tokens, *rows) if a_gathered else (*rows, *tokens)
        return [weight_grad(a, a_index, b, b_index, self.offsets_E, self.problem.num_rows, tile)[0]]
