"""Expert parallelism: rows travel to the process that holds their expert, and results travel back."""

from collections.abc import Sequence
from functools import reduce
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastmoe import kernels
from fastmoe._errors import check_int
from fastmoe._processes import ScaleGradient
from fastmoe.dispatch.exchange import Flight
from fastmoe.dispatch.local import Compute, RoutedRows
from fastmoe.dispatch.parcels import Parcel, pack_rows
from fastmoe.dispatch.spread import Spread
from fastmoe.dispatch.suppression import pack_tokens
from fastmoe.kernels import Plan

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


class AllToAllDispatcher:
    """Sends each routed row to the process that holds its expert, uneven and unpadded, and brings the result back.

    FastMoE (He et al. 2021, 2103.13262), section 4. The numbers of rows are exchanged first, once; on a GPU to learn
    them waits for the device. Every process of the group must run the layer equally often, also without tokens.

    Args:
        spread: which experts live where.
        chunks: tokens are split into so many parts; one part's rows travel while another's are computed. The same
            number on every process.
        suppress_duplicates: a token that goes to several experts of one process travels there once, and their
            weighted outputs come back summed.
        backend: of the kernels that sort and combine.
        name: of the layer, for errors.
        uniform: the experts return rows as wide as they are given, in one dtype; else processes ask each other.
        sum_gradients: gradients of the experts are the sum over the processes' losses, as hosts want them that divide
            by the number of processes themselves; else the mean.
    """

    def __init__(
        self,
        spread: Spread,
        *,
        chunks: int = 1,
        suppress_duplicates: bool = False,
        backend: str = "auto",
        name: str = "",
        uniform: bool = False,
        sum_gradients: bool = False,
    ) -> None:
        self.uniform, self.sum_gradients = uniform, sum_gradients
        self.spread, self.chunks = spread, check_int("chunks", chunks, 1)
        self.suppress_duplicates, self.backend, self.name = suppress_duplicates, backend, name
        self.passes = 0
        self.run = torch.compiler.disable(self._run)  # compiled code calls it as it is

    def _run(self, x_TD: Tensor, rows: RoutedRows, compute: Compute) -> tuple[Tensor, Tensor]:
        """As of a `LocalDispatcher`; `compute` gets the rows that came here and the experts that live here.

        Raises:
            CollectiveError: another process died or hangs; names the layer and the pass.
        """
        self.passes += 1
        pack = pack_tokens if self.suppress_duplicates else pack_rows
        parcels, combine, counts_E = pack(x_TD, rows, self.spread, self.chunks, self.place(), self.backend)
        y_TO = combine(self._pipeline(x_TD, parcels, compute), len(x_TD))
        return y_TO, counts_E.cumsum(0).to(torch.int32)

    def _pipeline(self, x_TD: Tensor, parcels: Sequence[Parcel], compute: Compute) -> Tensor:
        """Every parcel's results, one after another.

        A parcel is sent before the one ahead of it is computed, and results are waited for before the next are sent:
        at most one exchange is under way each way, and backward, which takes the steps in reverse, overlaps alike.
        """
        results: list[Tensor] = []
        back: Flight | None = None
        going: Flight | None = parcels[0].send(x_TD)
        for parcel, following in zip(parcels, [*parcels[1:], None], strict=True):
            assert going is not None
            buffer_RD, ticket = going.finish()
            going = None if following is None else following.send(x_TD)  # and what has arrived is let go
            y_RO = self._compute(parcel, buffer_RD, compute)
            if back is not None:
                results.append(back.finish()[0])
            back = parcel.back.start(y_RO, after=ticket)
        assert back is not None
        results.append(back.finish()[0])
        return torch.cat(results) if len(results) > 1 else results[0]

    def _compute(self, parcel: Parcel, buffer_RD: Tensor, compute: Compute) -> Tensor:
        spread, rows, ids_N = self.spread, parcel.rows, parcel.rows.expert_ids_N
        size = 1 if self.sum_gradients else spread.processes.size
        plan = kernels.plan(ids_N, len(spread.held), backend=self.backend) if spread.held else Plan(ids_N, ids_N.int())
        x_RD, weights_N = (ScaleGradient.apply(x, float(size)) for x in (buffer_RD, rows.weights_N))
        y_RO = compute(x_RD, rows.token_ids_N, weights_N, plan, rows.rows_per_token)
        y_RO = ScaleGradient.apply(y_RO, 1 / size)
        return y_RO if self.uniform else self._agreed(y_RO)

    def _agreed(self, y_RO: Tensor) -> Tensor:
        """Results as wide as on the other processes, and in one dtype.

        Raises:
            ValueError: on every process, if they are not equally wide.
        """
        spread, dtype = self.spread, DTYPES.index(y_RO.dtype)
        own = torch.tensor([y_RO.shape[1] if spread.held else -1, dtype if spread.held else -1], device=y_RO.device)
        told = [pair for pair in spread.processes.gather(own).tolist() if pair[0] >= 0]
        widths = sorted({width for width, _ in told})
        if len(widths) > 1:
            raise ValueError(f"all experts must return the same width; those of {self.name!r} return {widths}")
        if not spread.held:
            y_RO = F.pad(y_RO[:, :0], (0, widths[0]))
        return y_RO.to(reduce(torch.promote_types, (DTYPES[code] for _, code in told)))

    def __deepcopy__(self, memo: dict[int, Any]) -> "AllToAllDispatcher":
        """Itself: process groups cannot be copied."""
        return self

    def place(self, *, routed: bool = True) -> str:
        """Words for an error: which layer, in which pass; where that is not routed yet, in the one to come."""
        return f"MoE layer {self.name!r}, forward pass {self.passes + (not routed)}"
