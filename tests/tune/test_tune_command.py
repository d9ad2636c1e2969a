"""`fastmoe tune` from end to end, with toy layers. No time is asserted."""

import json
import logging

import pytest
import torch

pytest.importorskip("triton")

import fastmoe
from fastmoe.cli import main as cli
from fastmoe.kernels.registry import BACKENDS
from fastmoe.kernels.triton import mlp, tiles
from fastmoe.kernels.triton.tiles import KINDS, Tile, family, load_tiles, save_tiles
from fastmoe.tune import candidates, problems, run
from fastmoe.tune.measure import Outcome
from fastmoe.tune.problems import cases
from fastmoe.tune.run import default_device, tune

DEVICE = default_device()
NAME = family(DEVICE)
SHAPE = (3, 2, 16, 16, 2)
FLAGS = ["tune", "--shapes", "3x2x16x16x2", "--dtypes", "float32", "--activations", "swiglu"]


@pytest.fixture
def user_table(tmp_path, monkeypatch):
    """The user's table, in a folder of the test's own."""
    monkeypatch.setattr(tiles, "cache_folder", lambda: tmp_path)
    tiles._table.cache_clear()
    yield tmp_path / "tiles.json"
    tiles._table.cache_clear()


@pytest.fixture
def quick(monkeypatch):
    """`measure` without its measurements; the answer lists the problems and their seconds."""
    asked = []

    def measure(case, device, seconds):
        asked.append((case.problem.key, seconds))
        return Outcome(case.problem.key, 2.0, 1.0, Tile(16, 32, 16, stages=2), 3)

    monkeypatch.setattr(run, "measure", measure)
    return asked


def test_a_whole_run_fills_the_users_table(user_table, monkeypatch, capsys):
    pytest.importorskip("tyro")
    monkeypatch.setattr(problems, "DECODE_ROWS", 4)  # so that six rows are trained
    monkeypatch.setattr(candidates, "_INTERPRETED", candidates._INTERPRETED[:1])  # half the time
    assert cli(FLAGS) == 0
    expected = [case.problem.key for case in cases([SHAPE], ["float32"], ["swiglu"])]
    assert {key.split()[0] for key in expected} == set(KINDS)
    assert load_tiles(user_table).keys() == {NAME}
    assert sorted(load_tiles(user_table)[NAME]) == sorted(expected)
    printed = capsys.readouterr().out
    for key in expected:
        assert f"{key}: default " in printed
    assert f"6 of 6 problems are in {user_table}" in printed
    assert ("its times mean nothing" in printed) == (DEVICE.type == "cpu")


def test_another_file(user_table, tmp_path, quick):
    pytest.importorskip("tyro")
    out = tmp_path / "new" / "table.json"
    assert cli([*FLAGS, "--out", str(out)]) == 0
    assert set(load_tiles(out)) == {NAME}
    assert not user_table.exists()


def test_ctrl_c_leaves_what_was_found(user_table, quick, monkeypatch, capsys):
    pytest.importorskip("tyro")
    measure = run.measure

    def interrupted(*args):
        if quick:
            raise KeyboardInterrupt
        return measure(*args)

    monkeypatch.setattr(run, "measure", interrupted)
    assert cli(FLAGS) == 130
    assert list(load_tiles(user_table)[NAME]) == [quick[0][0]]
    assert "1 of 2 problems are in" in capsys.readouterr().out


def test_a_wrong_kernel_is_an_error(user_table, monkeypatch, capsys):
    pytest.importorskip("tyro")

    def measure(case, device, seconds):
        return Outcome(case.problem.key, wrong=("Tile(rows=16) is wrong",))

    monkeypatch.setattr(run, "measure", measure)
    assert cli(FLAGS) == 1
    captured = capsys.readouterr()
    assert captured.err.count("fastmoe tune: Tile(rows=16) is wrong\n") == 2
    assert "best does not run" in captured.out
    assert not user_table.exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--shapes", "5x3"], "a shape must be TxExDxHxK"),
        (["--dtypes", "float64"], "a dtype must be one of"),
        (["--activations", "sine"], "unknown activation"),
        (["--seconds", "0"], "seconds must be above 0"),
    ],
)
def test_flags_that_cannot_be(flags, message, user_table, quick, capsys):
    pytest.importorskip("tyro")
    assert cli(["tune", *flags]) == 2
    assert message in capsys.readouterr().err
    assert not quick


def test_a_file_that_is_no_table_is_not_written_over(tmp_path, quick, capsys):
    pytest.importorskip("tyro")
    out = tmp_path / "results.json"
    out.write_text('{"rows": [1, 2]}')
    assert cli([*FLAGS, "--out", str(out)]) == 2
    assert "is not a table of tiles" in capsys.readouterr().err
    assert out.read_text() == '{"rows": [1, 2]}'


def test_without_a_gpu_and_without_the_interpreter(user_table, quick, monkeypatch, capsys):
    pytest.importorskip("tyro")
    monkeypatch.setattr(BACKENDS["triton"], "available", lambda: "there is no CUDA or ROCm device")
    assert cli(FLAGS) == 2
    assert "there is no CUDA or ROCm device, so there is nothing to measure" in capsys.readouterr().err
    with pytest.raises(ValueError, match="no CUDA or ROCm device"):
        tune([SHAPE])
    assert not quick
    assert not user_table.exists()


def test_the_interpreters_times_never_count_for_a_gpu():
    other = "cuda" if DEVICE.type == "cpu" else "cpu"
    with pytest.raises(ValueError, match=f"got device '{other}'"):
        tune([SHAPE], device=torch.device(other))


def test_time_is_shared_and_runs_out(quick, monkeypatch):
    clock = iter([0.0, 0.0, 30.0])
    monkeypatch.setattr(run.time, "monotonic", lambda: next(clock))
    found = tune([SHAPE], ["float32"], ["swiglu"], DEVICE, 40.0, report=lambda outcome: None)
    assert quick == [(key, seconds) for key, seconds in zip(found, (40.0, 10.0), strict=True)]  # 3 of 2 shares: all
    quick.clear()
    monkeypatch.setattr(run, "cases", lambda *args: cases(*args) * 5)
    clock = iter([0.0, 0.0, *[31.0] * 9])
    tune([SHAPE], ["float32"], ["swiglu"], DEVICE, 40.0, report=lambda outcome: None)
    assert [seconds for _, seconds in quick[:2]] == [3 * 40.0 / 10, 3 * 9.0 / 9]
    clock = iter([0.0, 50.0])
    assert tune([SHAPE], ["float32"], ["swiglu"], DEVICE, 40.0) == {}


def test_too_large_for_the_memory(monkeypatch):
    def measure(*args):
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr(run, "measure", measure)
    outcomes = []
    assert tune([SHAPE], ["float32"], ["gelu"], report=outcomes.append) == {}
    assert [str(outcome).split(": ")[1] for outcome in outcomes] == ["left out, the GPU has not the memory"] * 2


def test_a_table_tuned_without_bias_serves_a_layer_with_one(user_table, caplog):
    """Where the table says `F.grouped_mm`, which knows no bias."""
    layer = fastmoe.MoE(16, 3, d_hidden=32, bias=True, backend="triton").to(DEVICE)
    with torch.no_grad():
        layer.experts.b1.normal_()
        layer.experts.b2.normal_()
    exact = fastmoe.MoE(16, 3, d_hidden=32, bias=True, backend="reference").to(DEVICE)
    exact.load_state_dict(layer.state_dict())
    x = torch.randn(5, 16, device=DEVICE, requires_grad=True)
    save_tiles(user_table, NAME, dict.fromkeys(keys_of(layer, x)))
    with caplog.at_level(logging.WARNING, logger="fastmoe"):
        got, expected = layer(x), exact(x)
        got.sum().backward()
        expected.sum().backward()
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    for (name, mine), theirs in zip(layer.named_parameters(), exact.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-4, atol=1e-5, msg=name)
    assert not caplog.records


def keys_of(layer, x):
    """The rows that a step of this layer asks for."""
    asked = []
    choose = mlp.choose_tile
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mlp, "choose_tile", lambda p, *a, **k: asked.append(p.key) or choose(p, *a, **k))
        layer(x).sum().backward()
    layer.zero_grad()
    assert {key.split()[0] for key in asked} == set(KINDS)
    return asked


def test_a_broken_table_is_made_anew(user_table, quick, caplog):
    pytest.importorskip("tyro")
    user_table.write_text('{"cpu": {"pro')
    with caplog.at_level(logging.WARNING, logger="fastmoe"):
        assert cli(FLAGS) == 0
    assert "is not a table of tiles" in caplog.text
    assert len(json.loads(user_table.read_text())[NAME]) == 2
