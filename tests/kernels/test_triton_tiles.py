"""Tables of tiles, and the rule where they have none."""

import json
import logging
from dataclasses import asdict, replace

import pytest
import torch

pytest.importorskip("triton")

from fastmoe.kernels.torch_ops.layout import grouped_mm_fits
from fastmoe.kernels.triton import mlp, tiles
from fastmoe.kernels.triton.tiles import KINDS, Problem, Tile, choose_tile, default_tile, save_tiles

CPU = torch.device("cpu")
PROBLEM = Problem("forward", torch.float16, 1000, 8, 256, 64, gated=True)


@pytest.fixture
def tables(tmp_path, monkeypatch):
    """Paths of a user's and a shipped table, both empty; no other test's tables are read."""
    paths = tmp_path / "user.json", tmp_path / "shipped.json"
    monkeypatch.setattr(tiles, "user_table", lambda: paths[0])
    monkeypatch.setattr(tiles, "shipped_table", lambda: paths[1])
    tiles._table.cache_clear()
    yield paths
    tiles._table.cache_clear()


def test_key_rounds_up_to_powers_of_two():
    assert PROBLEM.key == "forward gated float16 128x8x256x64"
    for change in ({"num_rows": 1024}, {"num_rows": 520}, {"outputs": 129}, {"inputs": 33}):
        assert replace(PROBLEM, **change).key == PROBLEM.key, change
    for change in (
        {"num_rows": 512},  # 64 rows for each expert
        {"num_rows": 1032},
        {"num_experts": 9},
        {"outputs": 128},
        {"outputs": 257},
        {"inputs": 65},
        {"gated": False},
        {"kind": "product"},
        {"dtype": torch.bfloat16},
    ):
        assert replace(PROBLEM, **change).key != PROBLEM.key, change


def test_few_rows_have_keys_of_their_own():
    few, many = Problem("product", torch.float32, 256, 256, 8, 8), Problem("product", torch.float32, 257, 256, 8, 8)
    assert few.key == "product float32 1x256x8x8 decode"
    assert many.key == "product float32 1x256x8x8"
    assert Problem("product", torch.float32, 0, 0, 0, 1).key == "product float32 1x1x1x1 decode"


def test_the_users_table_goes_before_the_shipped_one_and_both_before_the_rule(tables):
    user, shipped = Tile(16, 16, 16, group=1), Tile(16, 64, 32, group=1)
    other = replace(PROBLEM, inputs=1024)
    rule = default_tile(PROBLEM, "cpu")
    assert choose_tile(PROBLEM, CPU, True) == rule
    save_tiles(tables[1], "cpu", {PROBLEM.key: shipped, other.key: shipped})
    assert choose_tile(PROBLEM, CPU, True) == shipped
    save_tiles(tables[0], "cpu", {PROBLEM.key: user})
    assert choose_tile(PROBLEM, CPU, True) == user
    assert choose_tile(other, CPU, True) == shipped
    save_tiles(tables[0], "sm90", {other.key: user})  # another machine's
    assert choose_tile(other, CPU, True) == shipped


def test_null_means_pytorch_where_that_may_serve(tables):
    shipped = Tile(16, 64, 32)
    save_tiles(tables[0], "cpu", {PROBLEM.key: None})
    assert json.loads(tables[0].read_text()) == {"cpu": {PROBLEM.key: None}}
    assert choose_tile(PROBLEM, CPU, True) is None
    assert choose_tile(PROBLEM, CPU, False) == default_tile(PROBLEM, "cpu")
    save_tiles(tables[1], "cpu", {PROBLEM.key: shipped})
    assert choose_tile(PROBLEM, CPU, True) is None
    assert choose_tile(PROBLEM, CPU, False) == shipped


@pytest.mark.parametrize(("width", "bias"), [(8, False), (8, True), (7, False)])
def test_pytorch_serves_where_there_is_no_bias_and_widths_fit(tables, width, bias):
    """A table is by rounded sizes, so a row that says PyTorch is found for problems that it cannot take."""
    weight = torch.empty(3, width, 8)
    save_tiles(tables[0], "cpu", {Problem("product", torch.float32, 20, 3, width, 8).key: None})
    assert (mlp._tile("product", weight, 20, weight, bias=bias) is None) == (grouped_mm_fits(weight) and not bias)


def test_saving_keeps_other_rows_and_leaves_nothing_beside(tables):
    path = tables[0]
    first, second = Tile(16, 16, 16), Tile(32, 32, 32, tma=True, split=2)
    save_tiles(path, "sm90", {"a": first, "b": first})
    save_tiles(path, "gfx942", {"a": second})
    save_tiles(path, "sm90", {"b": second, "c": None})
    assert json.loads(path.read_text()) == {
        "sm90": {"a": asdict(first), "b": asdict(second), "c": None},
        "gfx942": {"a": asdict(second)},
    }
    assert [found.name for found in path.parent.iterdir()] == [path.name]


def test_a_save_that_fails_leaves_the_old_table(tables, monkeypatch):
    save_tiles(tables[0], "cpu", {PROBLEM.key: Tile(16, 16, 16)})
    before = tables[0].read_text()

    def broken(*args, **options):
        raise OSError("no space left")

    monkeypatch.setattr(type(tables[0]), "replace", broken)
    with pytest.raises(OSError, match="no space left"):
        save_tiles(tables[0], "cpu", {PROBLEM.key: None})
    assert tables[0].read_text() == before


@pytest.mark.parametrize(
    "text",
    [
        "not json",
        "[1, 2]",
        '{"cpu": 3}',
        '{"cpu": {"KEY": {"rows": 16}}}',
        '{"cpu": {"KEY": {"rows": 16, "columns": 16, "depth": 16, "colour": 3}}}',
        '{"cpu": {"KEY": {"rows": 48, "columns": 16, "depth": 16}}}',
        '{"cpu": {"KEY": {"rows": 8, "columns": 16, "depth": 16}}}',
        '{"cpu": {"KEY": {"rows": 16, "columns": 16, "depth": 16, "split": 0}}}',
        '{"cpu": {"KEY": {"rows": "16", "columns": 16, "depth": 16}}}',
    ],
)
def test_a_broken_table_is_ignored_with_a_warning(text, tables, caplog):
    tables[0].write_text(text.replace("KEY", PROBLEM.key))
    save_tiles(tables[1], "cpu", {PROBLEM.key: Tile(16, 64, 32)})
    with caplog.at_level(logging.WARNING, logger="fastmoe"):
        for _ in range(2):
            assert choose_tile(PROBLEM, CPU, True) == Tile(16, 64, 32)
    (record,) = caplog.records
    assert f"{tables[0]} is not a table of tiles" in record.getMessage()


@pytest.mark.parametrize("text", ["{", ""])
def test_a_table_cut_short_is_replaced(text, tables):
    tables[0].write_text(text)
    save_tiles(tables[0], "cpu", {PROBLEM.key: Tile(16, 64, 32)})
    assert choose_tile(PROBLEM, CPU, True) == Tile(16, 64, 32)


def test_the_shipped_table_is_whole():
    for rows in tiles.load_tiles(tiles.shipped_table()).values():
        for key in rows:
            assert key.split()[0] in KINDS


@pytest.mark.parametrize("name", ["sm80", "sm86", "sm89", "sm90", "sm100", "sm120", "gfx90a", "gfx942", "cpu"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_tiles_by_rule_are_legal(name, dtype):
    for kind in KINDS:
        for num_rows in (1, 2, 16, 200, 256, 257, 5000, 1 << 20):
            for num_experts in (1, 8, 300):
                for width in (1, 63, 1024, 16384):
                    for gated in (True, False):
                        tile = default_tile(Problem(kind, dtype, num_rows, num_experts, width, width, gated), name)
                        for size in (tile.rows, tile.columns, tile.depth):
                            assert size >= 16
                            assert size & (size - 1) == 0
                        assert tile.warps in (1, 2, 4, 8)
                        assert min(tile.group, tile.stages, tile.programs, tile.split) >= 1
                        assert tile.split == 1 or kind in ("forward", "product")
                        assert not tile.tma or name in ("sm90", "sm100", "sm120")
                        assert tiles._tile(asdict(tile)) == tile


def test_family_of_the_interpreter():
    assert tiles.family(CPU) == "cpu"
