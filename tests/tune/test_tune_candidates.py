"""The tiles that `fastmoe tune` tries."""

import itertools

import pytest
import torch

pytest.importorskip("triton")

from fastmoe.kernels.triton import tiles
from fastmoe.kernels.triton.tiles import KINDS, Problem, Tile
from fastmoe.tune.candidates import candidates, least_shared_bytes

FAMILIES = {"sm80": 166912, "sm89": 101376, "sm90": 232448, "sm120": 101376, "gfx942": 65536, "cpu": 1 << 30}
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("rows", [4, 200, 2000, 60_000], ids=lambda rows: f"{rows}-rows")
def test_lists_are_short_legal_and_without_doubles(name, rows):
    for kind, dtype, gated in itertools.product(KINDS, DTYPES, (True, False)):
        problem = Problem(kind, dtype, rows, 32, 2048, 1024, gated)
        found = candidates(problem, name, FAMILIES[name])
        assert (2 if name == "cpu" else 7) <= len(found) <= 24, problem.key
        assert len(set(found)) == len(found)
        for tile in found:
            assert tiles._tile(vars(tile)) == tile
            assert tile.columns >= 32
            assert tile.split == 1 or (rows <= 256 and kind in ("forward", "product"))
            assert not tile.tma or (name in ("sm90", "sm120") and kind != "weight" and dtype != torch.float32)


def test_less_shared_memory_leaves_smaller_tiles():
    problem = Problem("product", torch.bfloat16, 8192, 8, 1024, 2048)
    large, small = (candidates(problem, "sm80", FAMILIES[name]) for name in ("sm80", "gfx942"))
    assert max(least_shared_bytes(tile, problem) for tile in large) > FAMILIES["gfx942"]
    assert max(least_shared_bytes(tile, problem) for tile in small) <= FAMILIES["gfx942"]


def test_least_shared_memory():
    tile = Tile(128, 64, 32, stages=3)
    product = Problem("product", torch.bfloat16, 8192, 8, 1024, 2048)
    assert least_shared_bytes(tile, product) == (128 + 64) * 32 * 2 * 2
    assert least_shared_bytes(tile, Problem("forward", torch.float32, 8192, 8, 1024, 2048, True)) == 256 * 32 * 4 * 2
    one_stage = least_shared_bytes(tile, Problem("weight", torch.bfloat16, 8192, 8, 1024, 2048))
    assert one_stage == (128 + 64) * 32 * 2


def test_decoding_splits_no_further_than_the_reduction_goes():
    def parts(inputs, outputs=2048, gated=False, rows=8):
        problem = Problem("forward", torch.bfloat16, rows, 8, outputs, inputs, gated)
        return {tile.split for tile in candidates(problem, "sm90", FAMILIES["sm90"])}

    assert parts(4096) == {1, 2, 4}
    assert parts(128) == {1, 2}
    assert parts(64) == {1}
    assert parts(4096, rows=257) == {1}


def test_a_split_gated_forward_is_a_plain_product():
    """It has no two products at once, and so all of the columns."""
    problem = Problem("forward", torch.bfloat16, 8, 8, 2048, 4096, gated=True)
    found = candidates(problem, "sm90", FAMILIES["sm90"])
    assert {tile.columns for tile in found if tile.split > 1} == {64, 128}
    assert {tile.columns for tile in found if tile.split == 1} == {32, 64, 128}
