"""What the GPU presets measure, on a CPU with toy shapes: truth, rates, memory, targets, and runs that end early."""

import dataclasses
import importlib.util
import subprocess
from pathlib import Path

import pytest
import torch

from fastmoe.bench import gate, huggingface, kept, memory, plain, summary, truth
from fastmoe.bench import measure as measuring
from fastmoe.bench import run as running
from fastmoe.bench.contenders import DENSE, OURS, choose, table
from fastmoe.bench.graphs import in_graph_name
from fastmoe.bench.presets import PRESETS, Preset, toy
from fastmoe.bench.problem import Contender, Problem
from fastmoe.bench.run import Settings, run
from fastmoe.bench.targets import targets

SMALL = (24, 4, 32, 64, 2)
GPU = [name for name in PRESETS if name.startswith("gpu-")]


@pytest.mark.parametrize("activation", ["relu", "swiglu"])
@pytest.mark.parametrize("backward", [True, False])
def test_truth_does_not_depend_on_its_chunks(monkeypatch, activation, backward):
    found = []
    for chunk_bytes in (1, 1 << 30):
        monkeypatch.setattr(truth, "CHUNK_BYTES", chunk_bytes)
        p = Problem((24, 5, 32, 64, 2), torch.float64, activation, backward=backward)
        p.ids_TK[p.ids_TK == 3] = 2  # an expert without rows
        found.append(p.truth)
        assert len(list(truth.chunks(p))) == (5 if chunk_bytes == 1 else 1)
    y_TD = p.routed_mlp("reference", *p.leaves)
    y_TD.backward(p.grad_TD)
    whole = [y_TD.detach(), *p.grads()][: 5 if backward else 1]
    for parts, one, plain_one in zip(*found, whole, strict=True):
        torch.testing.assert_close(parts, one)
        torch.testing.assert_close(one, plain_one.to(one.dtype), rtol=1e-5, atol=1e-6)  # routing weights are float32


def test_truth_is_kept_in_float32():
    assert {t.dtype for t in Problem(SMALL, torch.bfloat16).truth[3:]} == {torch.float32}


def test_nan_in_the_last_gradient_is_found():
    def build(p):
        right = plain.ours(p)
        return Contender(
            right.forward, right.leaves, right.upstream, lambda: [*p.grads()[:3], p.grads()[3] * torch.nan]
        )

    found = gate.gather(Problem(SMALL, torch.float32), choose([OURS]) | {"liar": build})
    assert found.left_out["liar"] == "wrong: relative error nan, limit 1e-05"


def test_wrong_results_of_ours_are_an_error():
    right = choose([OURS])

    def build(p):
        return dataclasses.replace(right[OURS](p), forward=lambda: right[OURS](p).forward() * 2)

    with pytest.raises(RuntimeError, match="fastmoe: wrong: relative error"):
        gate.gather(Problem(SMALL, torch.float32), right | {OURS: build})


def summarized(p, seconds):
    found = gate.gather(p, choose([OURS]))
    times = {name: measuring.Times([s], [s]) for name, s in seconds.items()}
    return summary.summarize(p, found, times)


def test_rates():
    p = Problem(SMALL, torch.float32, "swiglu")
    row = summarized(p, {OURS: 0.5, DENSE: 0.25, "copy": 0.1, "matmul": 0.01})
    flops = 2 * 48 * 3 * 32 * 64
    matmul = 2 * 512**3 / 0.01
    assert row["matmul_tflops"] == pytest.approx(matmul / 1e12)
    for mode, passes in (("forward", 1), ("forward+backward", 3)):
        ours = row["modes"][mode]["contenders"][OURS]
        assert ours["tflops"] == pytest.approx(passes * flops / 0.5 / 1e12)
        assert ours["of_matmul"] == pytest.approx(passes * flops / 0.5 / matmul)
        assert ours["over_dense"] == pytest.approx(2)
        assert ours["over_bytes"] == pytest.approx(500 / row["modes"][mode]["bytes_ms"])


def test_graphs_are_compared_with_our_graph():
    ours, theirs = in_graph_name(OURS), in_graph_name("F.grouped_mm")
    seconds = {OURS: 1.0, DENSE: 1.0, ours: 0.5, theirs: 2.0, "F.grouped_mm": 3.0, "copy": 1.0, "matmul": 1.0}
    found = summarized(Problem(SMALL, torch.float32), seconds)["modes"]["forward"]["contenders"]
    assert found[theirs]["times_ours"] == 4
    assert found["F.grouped_mm"]["times_ours"] == 3


def test_graphs_run_where_they_are_asked_for_on_a_gpu():
    assert in_graph_name(OURS) in table()
    assert in_graph_name(OURS) not in choose([])
    found = gate.gather(Problem(SMALL, torch.float32, backward=False), choose([in_graph_name(OURS)]))
    assert found.left_out == {in_graph_name(OURS): "a CUDA graph needs a GPU"}


@pytest.mark.parametrize("activation", ["relu", "swiglu"])
def test_kept_memory(activation):
    p = Problem((64, 4, 32, 512, 2), torch.float32, activation)
    ours, theirs = (kept.memory_of(p, build(p)) for build in (plain.ours, plain.grouped_mm))
    gated = activation == "swiglu"
    assert ours["formula_bytes"] == theirs["formula_bytes"] == 4 * (64 * 32 + 128 * 512 * (1 + gated))
    assert ours["formula_bytes"] <= ours["kept_bytes"] < 1.05 * ours["formula_bytes"]
    assert theirs["kept_bytes"] > 1.05 * ours["kept_bytes"]


def test_a_gpu_of_78_gib_holds_every_preset(monkeypatch):
    monkeypatch.setattr(memory, "free_bytes", lambda device: 77 << 30)
    for name in GPU:
        for case in running.all_cases(PRESETS[name]):
            assert memory.too_large(case.shape, case.dtype, case.activation, "cuda") is None, case


@pytest.mark.parametrize("name", GPU)
def test_every_preset_with_toy_shapes(name):
    preset = toy(PRESETS[name])
    contenders = tuple(c for c in preset.contenders if c != "fastmoe (triton)")  # minutes, in the interpreter
    shown = []
    result = run(dataclasses.replace(preset, contenders=contenders), Settings(1, 5, dry=True), shown.append)
    assert result["dry"] is True
    assert not result["left"] + result["failed"] + result["skipped"]
    assert len(shown) == len(result["rows"]) == len(running.all_cases(preset))
    if name == "gpu-decode":
        assert all(list(row["modes"]) == ["forward"] for row in result["rows"])
    else:
        assert all(OURS in row["memory"] for row in result["rows"])
    if name == "gpu-hf" and importlib.util.find_spec("transformers"):
        assert all(huggingface.OURS in row["memory"] for row in result["rows"])
    assert name == "gpu-paper" or targets(name, result)


def test_targets():
    preset = Preset(((8, 64, 16, 16, 2),), ("float32",), ("relu",), contenders=("brute-force loop",))
    result = run(preset, Settings(1, 5, dry=True), lambda _: None)
    (row,) = result["rows"]
    figures = row["modes"]["forward+backward"]["contenders"]["brute-force loop"]
    for times, met in ((46.9, False), (47.1, True)):
        figures["times_ours"] = times
        found = {t["what"].split(", ", 7)[-1]: t["met"] for t in targets("gpu-paper", result) if "loop" in t["what"]}
        assert found == {
            "forward+backward: brute-force loop, times ours": met,
            "forward+backward: ModuleList loop, times ours": None,  # it did not run
        }
    found = [t["met"] for t in targets("gpu-large", result) if "grouped_mm" in t["what"]]
    assert found == [None] * 4
    assert targets("cpu", result) == []


@pytest.mark.skipif(importlib.util.find_spec("transformers") is None, reason="transformers is not installed")
def test_hugging_faces_target_is_on_every_line():
    preset = Preset(((8, 4, 16, 16, 2),), ("float32",), ("swiglu",), contenders=huggingface.NAMES)
    result = run(preset, Settings(1, 5, dry=True), lambda _: None)
    modes = result["rows"][0]["modes"]
    for times, met in ((0.99, False), (1.01, True)):
        for found in modes.values():
            found["contenders"]["HF grouped_mm"]["times_ours"] = times
        judged = targets("gpu-hf", result)
        assert [t["met"] for t in judged] == [met] * 2
        assert [mode in t["what"] for t, mode in zip(judged, modes, strict=True)] == [True] * 2


TINY = Preset(((8, 2, 16, 16, 2), (9, 2, 16, 16, 2)), ("float32",), ("gelu",), contenders=(OURS,))


def test_out_of_time_the_rows_left_are_named():
    result = run(TINY, Settings(1, budget=0), lambda _: None)
    assert result["rows"] == []
    assert [case["shape"]["T"] for case in result["left"]] == [8, 9]
    seen = []
    run(TINY, Settings(1, memory=False), lambda result: seen.append([case["shape"]["T"] for case in result["left"]]))
    assert seen == [[9], []]


def test_a_row_that_fails_is_named_and_the_next_begun(monkeypatch):
    measure = running.measure

    def fails_once(p, *rest):
        if p.shape[0] == 8:
            raise RuntimeError("out of shared memory")
        return measure(p, *rest)

    monkeypatch.setattr(running, "measure", fails_once)
    result = run(TINY, Settings(1, memory=False, go_on=True), lambda _: None)
    assert [row["shape"]["T"] for row in result["rows"]] == [9]
    (failed,) = result["failed"]
    assert (failed["shape"]["T"], failed["reason"]) == (8, "RuntimeError: out of shared memory")
    with pytest.raises(RuntimeError):
        run(TINY, Settings(1, memory=False), lambda _: None)


def test_a_dry_run_does_not_write_among_the_results():
    script = Path(__file__).parents[2] / "benchmarks" / "gpu.sh"
    ran = subprocess.run(["bash", script, "--dry"], capture_output=True, text=True)
    assert ran.returncode == 2
    assert "a dry run is no measurement" in ran.stderr
