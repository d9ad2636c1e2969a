"""`fastmoe bench`: who runs, who is turned away, and what is written. No timing is asserted."""

import importlib.util
import itertools
import json
import statistics

import pytest
import torch

pytest.importorskip("tyro")

from fastmoe.bench import gate, huggingface, peers, plain, presets, summary
from fastmoe.bench import measure as measuring
from fastmoe.bench import memory as bench_memory
from fastmoe.bench.command import Command as Flags
from fastmoe.bench.command import chosen, main
from fastmoe.bench.contenders import DENSE, LAYER, OURS, choose, table
from fastmoe.bench.memory import extra_memory
from fastmoe.bench.plot import plot
from fastmoe.bench.presets import PRESETS, Preset, parse_shape
from fastmoe.bench.problem import Contender, Problem
from fastmoe.bench.run import Settings, check, run
from fastmoe.cli import main as cli

SMALL = (24, 4, 32, 64, 2)
PLAIN = [OURS, "fastmoe (torch)", "F.grouped_mm", "ModuleList loop", "brute-force loop"]


def gathered(problem, names=()):
    return gate.gather(problem, choose(names))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("activation", ["relu", "gelu", "swiglu"])
def test_every_plain_contender_is_right(dtype, activation):
    found = gathered(Problem(SMALL, dtype, activation), PLAIN)
    assert set(found.contenders) == {*PLAIN, DENSE}
    assert not found.left_out
    assert all(found.errors[name] > 0 for name in PLAIN)


def test_an_expert_without_rows():
    problem = Problem((2, 16, 32, 32, 2), torch.float32)
    assert set(PLAIN) <= set(gathered(problem, PLAIN).contenders)
    touched = len(problem.ids_TK.unique())
    assert touched < 16
    assert problem.expert_bytes == touched * 2 * 32 * 32 * 4


@pytest.mark.skipif(importlib.util.find_spec("transformers") is None, reason="transformers is not installed")
def test_hugging_face_is_right():
    names = ["HF eager", "HF batched_mm", "HF grouped_mm"]
    found = gathered(Problem(SMALL, torch.float32, "swiglu"), names)
    assert set(names) <= set(found.contenders), found.left_out
    assert all("swiglu" in gathered(Problem(SMALL, torch.float32), names).left_out[name] for name in names)


@pytest.mark.skipif(importlib.util.find_spec("transformers") is None, reason="transformers is not installed")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_hugging_face_preset_with_tiny_shapes(dtype, tmp_path):
    shapes = ["--shapes", "1x4x32x64x2", "24x4x32x64x2", "--rounds", "2", "--no-memory"]
    assert main(["--preset", "hf", "--dtypes", dtype, *shapes, "--out", str(tmp_path)]) == 0
    result = json.loads((tmp_path / "hf.json").read_text())
    assert [row["shape"]["T"] for row in result["rows"]] == [1, 24]
    for row in result["rows"]:
        assert not row["left_out"]
        assert row["relative_errors"][huggingface.OURS] > 0
        for found in row["modes"].values():
            assert set(found["contenders"]) == {OURS, DENSE, *huggingface.NAMES}


@pytest.mark.skipif(importlib.util.find_spec("transformers") is None, reason="transformers is not installed")
@pytest.mark.parametrize("change", [lambda y: y * 1.001, lambda y: y.detach() + 0 * y])
def test_ours_in_transformers_is_not_timed_where_it_is_wrong(change, monkeypatch):
    experts = pytest.importorskip("fastmoe.integrations.huggingface.experts")
    right = experts.experts_forward
    monkeypatch.setattr(experts, "experts_forward", lambda *arguments: change(right(*arguments)))
    found = gathered(Problem(SMALL, torch.float32, "swiglu"), huggingface.NAMES)
    monkeypatch.undo()
    experts.register()
    assert set(found.contenders) == {OURS, DENSE, *huggingface.THEIRS}
    assert found.left_out[huggingface.OURS].startswith("wrong: relative error")


def test_implementations_of_transformers_are_compared_with_ours_there():
    runs = {OURS: [1.0, 1.0], huggingface.OURS: [2.0, 2.0], "HF grouped_mm": [6.0, 6.0], "F.grouped_mm": [3.0, 3.0]}
    floor = {"floor_ms": 1.0, "dense_ms": 1.0, "bytes_ms": 1.0, "flops": 1, "matmul_ms": 1.0}
    times = {name: summary.figures(name, run, runs, floor)["times_ours"] for name, run in runs.items()}
    assert times == {OURS: 1, huggingface.OURS: 2, "HF grouped_mm": 3, "F.grouped_mm": 3}
    del runs[huggingface.OURS]
    assert summary.figures("HF grouped_mm", runs["HF grouped_mm"], runs, floor)["times_ours"] == 6


def test_what_transformers_would_fill_in_backward_has_a_limit(monkeypatch):
    monkeypatch.setattr(huggingface, "_MOST_FILLED_BYTES", 1000)
    found = gathered(Problem(SMALL, torch.float32, "swiglu"), ["HF eager"])
    assert found.left_out["HF eager"].startswith("its backward would fill")


def wrong(change):
    def build(p):
        right = plain.ours(p)
        return Contender(lambda: change(right.forward()), right.leaves, right.upstream, right.grads)

    return build


@pytest.mark.parametrize("change", [lambda y: y * 1.001, lambda y: y + torch.nan, lambda y: y[:1].expand_as(y)])
def test_a_wrong_contender_is_not_timed(change):
    problem = Problem(SMALL, torch.float32)
    found = gate.gather(problem, choose([OURS]) | {"liar": wrong(change)})
    assert "liar" not in found.contenders
    assert found.left_out["liar"].startswith("wrong: relative error")


def test_a_wrong_gradient_is_found():
    def build(p):
        right = plain.ours(p)
        return Contender(right.forward, right.leaves, right.upstream, lambda: [2 * g for g in p.grads()])

    found = gate.gather(Problem(SMALL, torch.float32), choose([OURS]) | {"liar": build})
    assert "wrong" in found.left_out["liar"]


def test_a_contender_that_fails_does_not_stop_the_others():
    def build(p):
        raise RuntimeError("no kernel image\nmore")

    found = gate.gather(Problem(SMALL, torch.float32), choose([OURS]) | {"broken": build})
    assert found.left_out["broken"] == "failed: RuntimeError: no kernel image"
    assert OURS in found.contenders


def test_who_is_missing_is_named(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, package=None: None)
    found = gathered(Problem(SMALL, torch.float32, "swiglu"))
    for name in (*peers.LAYERS, "HF eager"):
        if name != LAYER:
            assert found.left_out[name].startswith("not installed: "), name


def test_layers_are_compared_with_our_layer(monkeypatch):
    monkeypatch.setitem(peers.LAYERS, "Tutel", peers.our_layer)
    problem = Problem(SMALL, torch.float32)
    found = gathered(problem, ["Tutel"])
    assert set(found.contenders) == {OURS, DENSE, LAYER, "Tutel"}
    times = {name: measuring.Times([t], [t]) for name, t in {OURS: 1.0, DENSE: 0.5, LAYER: 2.0, "Tutel": 6.0}.items()}
    times |= {name: measuring.Times([1.0]) for name in ("copy", "matmul")}
    row = summary.summarize(problem, found, times)
    assert row["modes"]["forward"]["contenders"]["Tutel"]["times_ours"] == 3


def test_the_floor():
    problem = Problem(SMALL, torch.float32)
    found = gathered(problem, [OURS])
    copy = 0.01
    bytes_ms = problem.expert_bytes / (2 * measuring.copied_bytes("cpu") / copy) * 1e3
    for dense_s, floor_ms in ((1e-9, bytes_ms), (0.5, 500.0)):
        times = {OURS: measuring.Times([1.0, 2.0, 3.0], [4.0]), DENSE: measuring.Times([dense_s] * 3, [dense_s])}
        row = summary.summarize(
            problem, found, times | {"copy": measuring.Times([copy] * 3), "matmul": measuring.Times([0.1])}
        )
        forward, step = row["modes"]["forward"], row["modes"]["forward+backward"]
        assert forward["floor_ms"] == pytest.approx(floor_ms)
        assert step["bytes_ms"] == pytest.approx(3 * bytes_ms)
        assert forward["contenders"][OURS]["over_floor"] == pytest.approx(2000 / floor_ms)


def test_ratios_are_of_rounds():
    assert summary.ratios([2.0, 9.0, 4.0], [1.0, 3.0, 4.0]) == tuple(
        statistics.quantiles([2.0, 3.0, 1.0], n=4, method="inclusive")
    )
    assert summary.ratios([6.0], [1.0, 3.0, 4.0]) == (2.0, 2.0, 2.0)


def test_the_slow_sit_out_rounds():
    problem = Problem(SMALL, torch.float32)
    found = gathered(problem, [OURS])
    times = measuring.measure(problem, found.contenders, rounds=3, seconds=0.0)
    assert [len(times[name].step) for name in (OURS, DENSE)] == [1, 1]
    assert len(times["copy"].forward) == 3


def test_each_round_has_an_order_of_its_own():
    names = ["a", "b", "c", "d"]
    orders = [measuring.shuffled(names, number) for number in range(20)]
    assert all(sorted(order) == names for order in orders)
    assert {order[0] for order in orders} == set(names)
    followers = {(x, y) for order in orders for x, y in itertools.pairwise(order)}
    assert len(followers) == 12


def test_decoding_has_no_backward():
    result = run(
        Preset((), ("float32",), ("gelu",), decode=((2, 8, 32, 32, 2),), contenders=(OURS,)),
        Settings(2, 30, memory=False),
        lambda _: None,
    )
    (row,) = result["rows"]
    assert list(row["modes"]) == ["forward"]
    assert "extra_mib" not in row


def test_the_command_writes_json_and_a_picture(tmp_path, capsys):
    flags = ["--shapes", "24x4x32x64x2", "--decode", "1x4x32x64x2", "--dtypes", "float32", "--activations", "gelu"]
    names = ["--contenders", "F.grouped_mm", "brute-force loop"]
    assert cli(["bench", *flags, *names, "--rounds", "2", "--out", str(tmp_path), "--name", "mine"]) == 0
    result = json.loads((tmp_path / "mine.json").read_text())
    assert {p.name for p in tmp_path.iterdir()} == {"mine.json", "mine.png"}
    assert (tmp_path / "mine.png").read_bytes().startswith(b"\x89PNG")
    trained, decoded = result["rows"]
    assert trained["shape"] == {"T": 24, "E": 4, "D": 32, "H": 64, "K": 2}
    assert set(trained["modes"]["forward+backward"]["contenders"]) == {OURS, DENSE, "F.grouped_mm", "brute-force loop"}
    assert set(trained["extra_mib"]) == {OURS, DENSE}
    assert list(decoded["modes"]) == ["forward"]
    assert result["machine"]["torch"] == torch.__version__
    assert result["backends"]["torch"] == "available"
    printed = capsys.readouterr().out
    assert "over floor" in printed
    assert "brute-force loop" in printed


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--shapes", "1x2x3"], "a shape must be TxExDxHxK"),
        (["--shapes", "8x2x32x32x3"], "K must be at most its E"),
        (["--contenders", "fastmoo"], "unknown contender 'fastmoo'. Did you mean 'fastmoe'"),
        (["--dtypes", "int64"], "a dtype must be one of PyTorch's floating types, as float32; got 'int64'"),
        (["--activations", "gelo"], "unknown activation 'gelo'"),
        (["--rounds", "0"], "rounds must be at least 1, got 0"),
        (["--out", "/dev/null/x"], "/dev/null"),
    ],
)
def test_what_cannot_be_run(flags, message, capsys):
    assert main(["--shapes", "8x2x32x32x2", *flags]) == 2
    assert message in capsys.readouterr().err


def test_no_gpu():
    if torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(ValueError, match="device 'cuda' is asked for and PyTorch finds none"):
        check(PRESETS["gpu-large"])


def test_presets():
    assert (1024, 256, 256, 512, 2) in PRESETS["cpu"].shapes
    assert [shape[0] for shape in PRESETS["cpu"].decode] == [1, 4, 16, 64]
    assert {shape[1] for shape in PRESETS["fastmoe-paper"].shapes} == {2, 4, 8, 16, 32, 64}
    for preset in PRESETS.values():
        assert set(preset.contenders) <= set(table())
    assert chosen(Flags(shapes=("8x2x32x32x2",))).decode == ()
    assert chosen(Flags(dtypes=("bfloat16",))).shapes == PRESETS["cpu"].shapes
    assert parse_shape("2048x8x512x1024x2") == presets.PRESETS["cpu"].shapes[0]


def test_the_papers_figure(tmp_path):
    result = run(
        Preset(tuple((8, e, 32, 32, 2) for e in (2, 4, 8)), ("float32",), ("gelu",), contenders=("ModuleList loop",)),
        Settings(2, 30, memory=False),
        lambda _: None,
    )
    plot(result, tmp_path / "sweep.png")
    assert (tmp_path / "sweep.png").stat().st_size > 10_000


def test_extra_memory_is_of_the_right_size():
    found = extra_memory((4096, 2, 64, 1024, 2), "float32", "gelu")
    if found is None:
        pytest.skip("this system does not tell")
    kept = 4096 * 2 * 1024 * 4 / 2**20  # the pre-activations alone
    assert kept < found[OURS] < found[DENSE] < 12 * kept


def test_what_memory_does_not_hold_is_skipped_and_named(tmp_path, capsys, monkeypatch):
    large, small = "64x8x1024x1024x2", "8x2x32x32x1"
    monkeypatch.setattr(bench_memory, "free_bytes", lambda device: 50 << 20)
    flags = ["--dtypes", "float32", "--activations", "gelu", "--contenders", "F.grouped_mm", "--no-memory"]
    assert main([*flags, "--shapes", large, small, "--rounds", "1", "--out", str(tmp_path)]) == 0
    result = json.loads((tmp_path / "cpu.json").read_text())
    assert [row["shape"]["T"] for row in result["rows"]] == [8]
    assert [skipped["shape"]["T"] for skipped in result["skipped"]] == [64]
    printed = " ".join(capsys.readouterr().out.split())
    assert "skipped: T 64, E 8, D 1024, H 1024, K 2, float32, gelu: it needs some" in printed
    assert main([*flags, "--shapes", large, "--out", str(tmp_path / "none")]) == 2
    assert list((tmp_path / "none").iterdir()) == []


def test_what_is_free_is_known_or_no_limit(monkeypatch):
    assert bench_memory.free_bytes("cpu") > 1 << 20
    monkeypatch.setattr(bench_memory, "free_bytes", lambda device: None)
    assert bench_memory.too_large((10**6, 10**4, 10**4, 10**4, 2), "float32", "gelu", "cpu") is None


@pytest.mark.parametrize("flags", [["--name", "a/b"], ["--seconds", "-1"], ["--seconds", "nan"]])
def test_flags_that_make_no_sense(flags, tmp_path, capsys):
    assert main([*flags, "--shapes", "8x2x32x32x1", "--out", str(tmp_path)]) == 2
    assert flags[0].strip("-") in capsys.readouterr().err
