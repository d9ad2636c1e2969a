"""Which tiles the products of the `triton` backend are cut into changes their speed alone."""

import pytest
import torch
from helpers import CASES, Case, assert_measured

pytest.importorskip("triton")

from triton_cases import DTYPES, KINDS, mlp_three_ways, use_tile

from fastmoe.kernels.triton import product
from fastmoe.kernels.triton.tiles import Tile

pytestmark = pytest.mark.usefixtures("poison")
KIND_NAMES = ("forward", "product", "turned", "backward", "weight")


def tile(rows, columns, depth, **options):
    return Tile(rows, columns, depth, **({"warps": 4, "stages": 1} | options))


TILES = {
    "least": tile(16, 16, 16, group=1),
    "wide": tile(32, 64, 32, group=4),
    "tall": tile(64, 16, 32, group=2),
    "larger_than_the_problem": tile(128, 128, 64),
    "more_programs": tile(16, 32, 16, programs=3),
    "split_in_two": tile(16, 32, 16, split=2),
    "split_in_three": tile(32, 16, 16, split=3),
    "split_into_more_than_there_is": tile(16, 32, 32, split=8),
    "tma": tile(16, 32, 16, tma=True),
    "tma_split": tile(32, 32, 16, tma=True, split=3),
    "each_kind_its_own": {
        "forward": tile(16, 32, 16, split=2),
        "product": tile(32, 16, 32, group=1),
        "turned": tile(64, 32, 16, split=3),
        "backward": tile(32, 32, 32, tma=True),
        "weight": tile(16, 64, 32, group=2),
    },
    "one_of_them_by_pytorch": {name: tile(32, 32, 32) for name in KIND_NAMES} | {"product": None, "backward": None},
    "the_others_by_pytorch": dict.fromkeys(KIND_NAMES) | {"product": tile(32, 32, 32)},
}


@pytest.mark.parametrize("name", TILES)
def test_tiles(name, monkeypatch):
    """Widths that tensor descriptors and `F.grouped_mm` take, though no multiple of a tile's."""
    asked = use_tile(monkeypatch, TILES[name])
    activation, bias = KINDS[1] if "pytorch" in name else ("geglu", True)
    assert_measured(*mlp_three_ways(Case(25, 3, 40, 24, 2, "dropped"), activation, bias, torch.float32))
    assert set(asked) == set(KIND_NAMES)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("name", ["tma", "tma_split", "each_kind_its_own", "one_of_them_by_pytorch"])
def test_tiles_in_half_precision(name, dtype, monkeypatch):
    use_tile(monkeypatch, TILES[name])
    assert_measured(*mlp_three_ways(Case(17, 3, 24, 24, 2, "dropped"), "swiglu", False, dtype))


@pytest.mark.parametrize("name", ["wide", "split_in_three", "tma"])
def test_tiles_of_odd_widths(name, monkeypatch):
    use_tile(monkeypatch, TILES[name])
    assert_measured(*mlp_three_ways(Case(20, 3, 35, 17, 2, "dropped"), "gelu", True, torch.float32))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", [name for name in TILES if "pytorch" not in name])
@pytest.mark.parametrize("case", CASES)
def test_tiles_in_every_case(case, name, dtype, monkeypatch):
    use_tile(monkeypatch, TILES[name])
    for activation, bias in KINDS:
        for per_token in (True, False):
            assert_measured(*mlp_three_ways(CASES[case], activation, bias, dtype, per_token))


@pytest.mark.parametrize("processors", [1, 200])
def test_any_number_of_programs(processors, monkeypatch):
    """One program that walks all tiles, and more programs than tiles."""
    monkeypatch.setattr(product, "num_processors", lambda device: processors)
    use_tile(monkeypatch, tile(16, 16, 16, group=3))
    assert_measured(*mlp_three_ways(Case(20, 3, 35, 17, 2), "swiglu", True, torch.float32))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "case", [Case(1, 4, 66, 40, 2), Case(3, 6, 36, 33, 2, "dropped")], ids=["one_token", "three_tokens"]
)
def test_few_tokens_split_the_reduction(case, dtype, monkeypatch):
    asked = use_tile(monkeypatch, tile(16, 64, 16, split=4))
    for activation, bias in KINDS:
        assert_measured(*mlp_three_ways(case, activation, bias, dtype))
    assert {"forward", "product"} <= set(asked)
