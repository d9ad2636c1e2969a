"""Where in the whole tensor a process's part of it is."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.placement_types import Placement

Shape = tuple[int, ...]


def placed(name: str, tensor: Tensor) -> tuple[Tensor, Shape, Shape]:
    """What this process holds, without gradient and sharing memory; the whole tensor's shape; the part's offset in it.

    Raises:
        ValueError: a DTensor of which this process does not hold one box.
    """
    shape = tuple(tensor.shape)
    if not isinstance(tensor, DTensor):
        return tensor.detach(), shape, (0,) * len(shape)
    local, mesh = tensor.to_local().detach(), tensor.device_mesh
    if (coordinate := mesh.get_coordinate()) is None:
        raise ValueError(f"{name!r} lives on other processes: this one is not in {mesh}")
    if any(placement.is_partial() for placement in tensor.placements):
        raise ValueError(f"{name!r} must be sharded or replicated, got {tensor.placements}")
    sizes, offset = box(shape, tensor.placements, mesh.shape, coordinate)
    if tuple(local.shape) != sizes:
        raise ValueError(
            f"{name!r} is {tensor.placements} over {mesh}: expected {sizes} of it here, got {tuple(local.shape)}"
        )
    return local, shape, offset


def box(
    shape: Shape, placements: Sequence[Placement], mesh: Sequence[int], coordinate: Sequence[int]
) -> tuple[Shape, Shape]:
    """Sizes and offset of the part that a DTensor has at a coordinate of a mesh of these sizes.

    FSDP divides what expert parallelism has divided before, although its dimension of the mesh comes first:
    `_StridedShard`, whose split_factor is the number of parts that it found. So the order of division is that of
    split factors. DTensor's own `compute_local_shape_and_global_offset` goes through the mesh from left to right
    instead, and where parts are uneven gives some processes experts that are not theirs (7 experts over dp=3, ep=2).
    """
    sizes, offset = list(shape), [0] * len(shape)
    for i in sorted(range(len(placements)), key=lambda i: getattr(placements[i], "split_factor", 0)):
        if (dim := getattr(placements[i], "dim", None)) is not None:
            each = -(-sizes[dim] // mesh[i])
            start = min(coordinate[i] * each, sizes[dim])
            offset[dim] += start
            sizes[dim] = min(each, sizes[dim] - start)
    return tuple(sizes), tuple(offset)
