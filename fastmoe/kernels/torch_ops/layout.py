"""How rows sorted by expert are laid out for PyTorch's matrix products, and the products themselves.

A layout puts each routed row in a slot. Three layouts serve one contract:

- `LoopLayout`: slots are sorted positions; one `torch.mm` per expert, looped over by `F.grouped_mm` where that takes
  the matrices. Best for large groups on a CPU.
- `PaddedLayout`: every expert has C slots, C the largest count; one `torch.bmm`. Best for many small groups.
- `GroupedLayout`: slots are sorted positions; `F.grouped_mm`, which reads the counts on the device. For accelerators;
  what it does not take (float64, rows that are no multiple of 16 bytes) goes through the loop, which waits for the
  device to know the counts.

S slots, C slots of one expert; other letters as in `fastmoe.kernels.contract`.
"""

from functools import cached_property
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from fastmoe.kernels.memory import new_buffer
from fastmoe.kernels.reference import accumulation_dtype


class Layout(Protocol):
    num_slots: int

    def put(self, rows_NI: Tensor) -> Tensor:
        """Sorted rows `(N, I)` to slots `(S, I)`; slots without a row are zero."""
        ...

    def take(self, slots_SO: Tensor) -> Tensor:
        """Slots `(S, O)` to sorted rows `(N, O)`; rows that are not computed are zero."""
        ...

    def expand(self, values_EO: Tensor) -> Tensor:
        """Each slot gets its expert's values, `(S, O)`."""
        ...

    def mm(self, slots_SI: Tensor, weight_EOI: Tensor, bias_EO: Tensor | None) -> Tensor:
        """`slots @ weight[e].T + bias[e]`, `(S, O)`."""
        ...

    def mm_transposed(self, slots_SO: Tensor, weight_EOI: Tensor) -> Tensor:
        """`slots @ weight[e]`, `(S, I)`."""
        ...

    def weight_grad(self, grad_SO: Tensor, slots_SI: Tensor) -> Tensor:
        """`grad[e].T @ slots[e]`, `(E, O, I)`."""
        ...

    def bias_grad(self, grad_SO: Tensor) -> Tensor:
        """`grad[e].sum(0)`, `(E, O)`."""
        ...


class LoopLayout:
    def __init__(self, num_rows: int, offsets_E: Tensor) -> None:
        self.num_rows, self.num_slots, self.offsets_E = num_rows, int(offsets_E[-1]), offsets_E

    @cached_property
    def groups(self) -> list[tuple[int, int, int]]:
        """`(expert, start, end)` of every expert's slots."""
        ends = self.offsets_E.tolist()
        return list(zip(range(len(ends)), [0, *ends[:-1]], ends, strict=True))

    def put(self, rows_NI: Tensor) -> Tensor:
        return rows_NI[: self.num_slots]

    def take(self, slots_SO: Tensor) -> Tensor:
        if self.num_slots == self.num_rows:
            return slots_SO
        return F.pad(slots_SO, (0, 0, 0, self.num_rows - self.num_slots))

    def expand(self, values_EO: Tensor) -> Tensor:
        counts_E = torch.diff(self.offsets_E, prepend=self.offsets_E.new_zeros(1))
        return torch.repeat_interleave(values_EO, counts_E, dim=0, output_size=self.num_slots)

    def _takes_grouped_mm(self, weight_EOI: Tensor) -> bool:
        return self.num_slots > 0 and grouped_mm_fits(weight_EOI)

    def mm(self, slots_SI: Tensor, weight_EOI: Tensor, bias_EO: Tensor | None) -> Tensor:
        if bias_EO is None and self._takes_grouped_mm(weight_EOI):
            return F.grouped_mm(slots_SI, weight_EOI.transpose(1, 2), offs=self.offsets_E)
        out_SO = slots_SI.new_empty(self.num_slots, weight_EOI.shape[1])
        weights = weight_EOI.transpose(1, 2).unbind(0)
        biases = None if bias_EO is None else bias_EO.unbind(0)
        for e, start, end in self.groups:
            if start == end:
                continue
            if biases is None:
                torch.mm(slots_SI[start:end], weights[e], out=out_SO[start:end])
            else:
                torch.addmm(biases[e], slots_SI[start:end], weights[e], out=out_SO[start:end])
        return out_SO

    def mm_transposed(self, slots_SO: Tensor, weight_EOI: Tensor) -> Tensor:
        if self._takes_grouped_mm(weight_EOI):
            return F.grouped_mm(slots_SO, weight_EOI, offs=self.offsets_E)
        out_SI = slots_SO.new_empty(self.num_slots, weight_EOI.shape[2])
        weights = weight_EOI.unbind(0)
        for e, start, end in self.groups:
            if start < end:
                torch.mm(slots_SO[start:end], weights[e], out=out_SI[start:end])
        return out_SI

    def weight_grad(self, grad_SO: Tensor, slots_SI: Tensor) -> Tensor:
        out_EOI = new_buffer(grad_SO, len(self.groups), grad_SO.shape[1], slots_SI.shape[1])
        outs = out_EOI.unbind(0)
        for e, start, end in self.groups:
            if start < end:
                torch.mm(grad_SO[start:end].t(), slots_SI[start:end], out=outs[e])
            else:
                outs[e].zero_()
        return out_EOI

    def bias_grad(self, grad_SO: Tensor) -> Tensor:
        out_EO = grad_SO.new_empty(len(self.groups), grad_SO.shape[1])
        outs = out_EO.unbind(0)
        for e, start, end in self.groups:
            torch.sum(grad_SO[start:end], 0, out=outs[e])
        return out_EO


class PaddedLayout:
    def __init__(self, num_rows: int, offsets_E: Tensor, width: int) -> None:
        self.num_rows, self.num_experts, self.width = num_rows, len(offsets_E), width
        self.num_slots = self.num_experts * width
        counts_E = torch.diff(offsets_E, prepend=offsets_E.new_zeros(1)).long()
        first_slot_E = torch.arange(0, self.num_slots, width) if width else offsets_E.new_zeros(self.num_experts)
        shift_E = first_slot_E - (offsets_E - counts_E)
        positions_R = torch.arange(int(offsets_E[-1]))
        self.slot_R = positions_R + torch.repeat_interleave(shift_E, counts_E, output_size=len(positions_R))

    def put(self, rows_NI: Tensor) -> Tensor:
        slots_SI = rows_NI.new_zeros(self.num_slots, rows_NI.shape[1])
        return slots_SI.index_copy_(0, self.slot_R, rows_NI[: len(self.slot_R)])

    def take(self, slots_SO: Tensor) -> Tensor:
        rows_RO = slots_SO.index_select(0, self.slot_R)
        if len(self.slot_R) == self.num_rows:
            return rows_RO
        return F.pad(rows_RO, (0, 0, 0, self.num_rows - len(self.slot_R)))

    def _by_expert(self, slots: Tensor) -> Tensor:
        return slots.view(self.num_experts, self.width, slots.shape[1])

    def expand(self, values_EO: Tensor) -> Tensor:
        return values_EO.unsqueeze(1).expand(-1, self.width, -1).flatten(0, 1)

    def mm(self, slots_SI: Tensor, weight_EOI: Tensor, bias_EO: Tensor | None) -> Tensor:
        slots_ECI, weight_EIO = self._by_expert(slots_SI), weight_EOI.transpose(1, 2)
        if bias_EO is None:
            return torch.bmm(slots_ECI, weight_EIO).flatten(0, 1)
        return torch.baddbmm(bias_EO.unsqueeze(1), slots_ECI, weight_EIO).flatten(0, 1)

    def mm_transposed(self, slots_SO: Tensor, weight_EOI: Tensor) -> Tensor:
        return torch.bmm(self._by_expert(slots_SO), weight_EOI).flatten(0, 1)

    def weight_grad(self, grad_SO: Tensor, slots_SI: Tensor) -> Tensor:
        out_EOI = new_buffer(grad_SO, self.num_experts, grad_SO.shape[1], slots_SI.shape[1])
        return torch.bmm(self._by_expert(grad_SO).transpose(1, 2), self._by_expert(slots_SI), out=out_EOI)

    def bias_grad(self, grad_SO: Tensor) -> Tensor:
        return self._by_expert(grad_SO).sum(1)


class GroupedLayout:
    def __init__(self, num_rows: int, offsets_E: Tensor) -> None:
        self.num_slots, self.offsets_E = num_rows, offsets_E
        positions_N = torch.arange(num_rows, device=offsets_E.device, dtype=offsets_E.dtype)
        self.expert_N = torch.searchsorted(offsets_E, positions_N, right=True)
        self.routed_N1 = (self.expert_N < len(offsets_E)).unsqueeze(1)

    def put(self, rows_NI: Tensor) -> Tensor:
        return torch.where(self.routed_N1, rows_NI, 0)

    take = put

    def expand(self, values_EO: Tensor) -> Tensor:
        return values_EO[self.expert_N.clamp(max=len(self.offsets_E) - 1)]

    def mm(self, slots_SI: Tensor, weight_EOI: Tensor, bias_EO: Tensor | None) -> Tensor:
        out_SO = F.grouped_mm(slots_SI, weight_EOI.transpose(1, 2), offs=self.offsets_E)
        if bias_EO is not None:
            out_SO = out_SO + self.expand(bias_EO)
        return torch.where(self.routed_N1, out_SO, 0)

    def mm_transposed(self, slots_SO: Tensor, weight_EOI: Tensor) -> Tensor:
        return torch.where(self.routed_N1, F.grouped_mm(slots_SO, weight_EOI, offs=self.offsets_E), 0)

    def weight_grad(self, grad_SO: Tensor, slots_SI: Tensor) -> Tensor:
        return F.grouped_mm(grad_SO.t(), slots_SI, offs=self.offsets_E)

    def bias_grad(self, grad_SO: Tensor) -> Tensor:
        dtype = accumulation_dtype(grad_SO.dtype)
        sums = grad_SO.new_zeros(len(self.offsets_E) + 1, grad_SO.shape[1], dtype=dtype)
        return sums.index_add_(0, self.expert_N, grad_SO.to(dtype))[:-1].to(grad_SO.dtype)


# What one more `torch.mm` call, and moving one byte into padded slots, cost on a CPU, in floating-point operations that
# `torch.bmm` does in that time. Measured with the shapes of `fastmoe bench` on a 2-core Xeon, whose small bfloat16
# products pay a set-up of some 20 us each.
_COSTS_IN_FLOPS = {torch.bfloat16: (5e7, 100), torch.float16: (5e7, 100)}
_COSTS_IN_FLOPS_DEFAULT = (1e6, 25)
_MAX_PADDING = 4  # slots per row, a bound on memory


def choose_layout(num_rows: int, offsets_E: Tensor, weight_EOI: Tensor) -> Layout:
    """The cheapest layout for these counts and matrices of this shape and dtype."""
    if offsets_E.device.type != "cpu":
        if grouped_mm_fits(weight_EOI):
            return GroupedLayout(num_rows, offsets_E)
        return LoopLayout(num_rows, offsets_E)
    ends = offsets_E.tolist()
    counts = [end - start for start, end in zip([0, *ends[:-1]], ends, strict=True)]
    width = max(counts)
    slots, (_, rows_out, rows_in) = width * len(ends), weight_EOI.shape
    call_cost, byte_cost = _COSTS_IN_FLOPS.get(weight_EOI.dtype, _COSTS_IN_FLOPS_DEFAULT)
    moved_bytes = slots * (rows_in + rows_out) * weight_EOI.element_size()
    padding_cost = 2 * rows_in * rows_out * (slots - ends[-1]) + byte_cost * moved_bytes
    if slots <= _MAX_PADDING * ends[-1] and padding_cost < call_cost * sum(count > 0 for count in counts):
        return PaddedLayout(num_rows, offsets_E, width)
    return LoopLayout(num_rows, offsets_E)


def grouped_mm_fits(weight_EOI: Tensor) -> bool:
    """Whether `F.grouped_mm` takes such matrices: no float64, and rows of a multiple of 16 bytes."""
    aligned = all(width * weight_EOI.element_size() % 16 == 0 for width in weight_EOI.shape[1:])
    return aligned and weight_EOI.dtype != torch.float64
