"""FastMoE's functions: counting, sending and joining rows.

`MOEScatter`, `MOEGather`, `AllGather` and `Slice` are called by `.apply`, and the gradient passes through them. What
takes part in an exchange is the group of the last `ensure_comm`, as in FastMoE.
"""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastmoe._processes import Processes
from fastmoe.dispatch import Slices
from fmoe.passage import Passage, rows_to_choices, sort_choices, swap_counts
from fmoe.workers import workers

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

_moe_group: "ProcessGroup | None" = None


def ensure_comm(t: Tensor, comm: "ProcessGroup | None") -> None:
    """Set the group that the functions here exchange in; None means all processes.

    `FMoE` calls it before its gate. Only these functions go by it: layers, and the gates of `fmoe.gates`, know theirs.

    Args:
        t: not looked at; FastMoE took the device from it.
        comm: the workers.
    """
    global _moe_group
    _moe_group = comm


def get_moe_group() -> "ProcessGroup | None":
    """The group of the last `ensure_comm`."""
    return _moe_group


def count_by_gate(
    gate: Tensor, num_expert: int, world_size: int, require_pos: bool = True
) -> tuple[Tensor | None, Tensor, Tensor]:
    """Where rows go and how many come.

    Args:
        gate: int64, the expert of each row, E = world_size * num_expert of them; -1 goes nowhere. Any shape.
        num_expert: e, experts in each worker.
        world_size: P, workers.
        require_pos: whether the first answer is wanted.

    Returns:
        `pos` int64 `(N,)`, the rows that are sent in the order of experts, or None; how many rows go to each expert,
        int64 `(P * e,)`; and how many come from each worker for each expert here, int64 `(P * e,)`.

    Raises:
        ValueError: on a CPU an expert that is not there; a group of another size.
    """
    processes = workers(world_size, _moe_group)
    order_N, local_expert_count = sort_choices(gate, num_expert * world_size)
    global_expert_count = swap_counts(local_expert_count, num_expert, processes)
    pos = order_N[: int(local_expert_count.sum())] if require_pos else None
    return pos, local_expert_count, global_expert_count


def prepare_forward(gate: Tensor, num_expert: int, world_size: int) -> tuple[Tensor, Tensor, Tensor, Tensor, int]:
    """What `MOEScatter` and `MOEGather` need to know; arguments as of `count_by_gate`.

    Returns:
        `pos` as of `count_by_gate`; then on the CPU its two counts, how many rows each expert here gets `(e,)`, and
        how many all of them get.
    """
    pos, local_expert_count, global_expert_count = count_by_gate(gate, num_expert, world_size)
    assert pos is not None
    global_expert_count = global_expert_count.cpu()
    fwd_expert_count = global_expert_count.view(world_size, num_expert).sum(0)
    return pos, local_expert_count.cpu(), global_expert_count, fwd_expert_count, int(fwd_expert_count.sum())


class MOEScatter:
    """Rows to their experts."""

    @staticmethod
    def apply(
        inp: Tensor,
        pos: Tensor,
        local_expert_count: Tensor,
        global_expert_count: Tensor,
        fwd_batch_size: int,
        world_size: int,
    ) -> Tensor:
        """The rows that come here, `(fwd_batch_size, D)`, by expert and then by worker.

        Args:
            inp: `(T, D)`.
            pos: int64, which of them are sent, in the order of experts; with K choices `pos // K` of `count_by_gate`.
            local_expert_count, global_expert_count, fwd_batch_size: of `prepare_forward`.
            world_size: workers.
        """
        passage = _passage(pos, local_expert_count, global_expert_count, world_size)
        return passage.there(inp.index_select(0, pos))[0]


class MOEGather:
    """Rows back from their experts."""

    @staticmethod
    def apply(
        global_output_buf: Tensor,
        pos: Tensor,
        local_expert_count: Tensor,
        global_expert_count: Tensor,
        local_batch_size: int,
        world_size: int,
    ) -> Tensor:
        """The experts' answers, `(local_batch_size, O)`, where their rows stood; zeros for rows that went nowhere.

        Args:
            global_output_buf: `(fwd_batch_size, O)`, in the order in which `MOEScatter` gives rows.
            pos: of `count_by_gate`.
            local_expert_count, global_expert_count: of `prepare_forward`.
            local_batch_size: rows of all choices, T * K.
            world_size: workers.
        """
        passage = _passage(pos, local_expert_count, global_expert_count, world_size)
        return rows_to_choices(passage.back(global_output_buf), pos, local_batch_size)


def _passage(pos: Tensor, local_expert_count: Tensor, global_expert_count: Tensor, world_size: int) -> Passage:
    counts = (count.cpu().view(world_size, -1) for count in (local_expert_count, global_expert_count))
    return Passage(workers(world_size, _moe_group), pos, *counts)


class Slice(torch.autograd.Function):
    """`Slice.apply(inp, rank, world_size, group)`: this process's part of rows that all in the group have.

    The lengths of the parts differ by one at most. The gradient is that of all parts.
    """

    @staticmethod
    def forward(ctx: Any, inp: Tensor, rank: int, world_size: int, group: "ProcessGroup | None") -> Tensor:
        ctx.slices, ctx.length = Slices(_sharers(rank, world_size, group)), len(inp)
        return inp[ctx.slices.mine(len(inp))].clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        return ctx.slices.whole(grad, ctx.length), None, None, None


class AllGather(torch.autograd.Function):
    """`AllGather.apply(inp, rank, world_size, group)`: the rows of all processes of the group, by rank.

    The gradient is this process's part of its own: every process is taken to do the same with the whole.
    """

    @staticmethod
    def forward(ctx: Any, inp: Tensor, rank: int, world_size: int, group: "ProcessGroup | None") -> Tensor:
        whole, ctx.mine = _sharers(rank, world_size, group).gather_rows(inp)
        return whole

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        return grad[ctx.mine], None, None, None


def _sharers(rank: int, world_size: int, group: "ProcessGroup | None") -> Processes:
    """The processes of a group.

    Raises:
        ValueError: it has another size, or this process another rank in it.
    """
    processes = Processes.of(group)
    if (processes.rank, processes.size) != (rank, world_size):
        raise ValueError(
            f"this is process {processes.rank} of {processes.size} in the group, got rank={rank}, "
            f"world_size={world_size}"
        )
    return processes
