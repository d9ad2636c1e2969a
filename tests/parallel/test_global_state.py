"""Where a process's part of a tensor lies in the whole."""

import itertools

import pytest
import torch
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.placement_types import _StridedShard

from fastmoe.parallel.global_state_placement import box


def chunk(rows, parts, i):
    """The i-th part as `torch.chunk` and DTensor divide: as large as the first while they last."""
    parts = rows.chunk(parts)
    return parts[i] if i < len(parts) else rows[:0]


@pytest.mark.parametrize("mesh", list(itertools.product(range(1, 5), range(2, 5))), ids=str)
def test_fsdp_over_expert_parallel(mesh):
    """Each process of (dp, ep) holds what remains when ep divides first and dp divides its parts."""
    placements = [_StridedShard(0, split_factor=mesh[1]), Shard(0)]
    for experts in range(1, 12):
        covered = []
        for dp, ep in itertools.product(*map(range, mesh)):
            (rows, width), (start, column) = box((experts, 3), placements, mesh, (dp, ep))
            covered += range(start, start + rows)
            assert (
                covered[len(covered) - rows :] == chunk(chunk(torch.arange(experts), mesh[1], ep), mesh[0], dp).tolist()
            )
            assert (width, column) == (3, 0)
        assert sorted(covered) == list(range(experts))


def test_other_placements():
    assert box((5, 8), [Replicate(), Shard(1)], (2, 4), (1, 3)) == ((5, 2), (0, 6))
    assert box((8, 8), [Shard(0), Shard(0)], (2, 2), (1, 1)) == ((2, 8), (6, 0))
    assert box((8, 8), [Shard(0), Shard(1)], (2, 2), (1, 0)) == ((4, 4), (4, 0))
    assert box((), [Replicate()], (2,), (1,)) == ((), ())
