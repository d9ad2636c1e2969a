"""benchmarks/language_models.py on made-up runs: which of them it measures, and what its JSON says of them."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from finished_runs import write_run

from fastmoe.train.corpus import load_corpus
from fastmoe.train.options import to_plain
from fastmoe.train.recipes import recipe

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
RECIPES = ("gpt-tiny", "gpt-tiny-moe", "txl-tiny", "txl-tiny-moe")


@pytest.fixture
def script(tmp_path, monkeypatch):
    """The script with all runs of three seeds finished, writing into `tmp_path`; a run of its own is an error."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import language_models

    monkeypatch.setattr(language_models, "IMAGES", tmp_path)
    monkeypatch.setattr(language_models, "RESULTS", tmp_path / "results.json")
    monkeypatch.setattr(subprocess, "Popen", lambda *args, **options: pytest.fail(f"started {args}"))
    monkeypatch.setattr(language_models, "commit", lambda: "abc")
    monkeypatch.setattr(language_models, "machine", lambda: {"cpu": "some CPU"})
    for name in ("data", "valid"):
        (tmp_path / name).write_text(name * 50)
    for name in RECIPES:
        for seed in (1, 2, 3):
            write_finished(tmp_path, name, seed)
    return language_models


def write_finished(tmp_path, name, seed, **changes):
    planned = to_plain(recipe(name))
    changes = {
        **{f"config.{section}": planned[section] for section in ("model", "moe", "optim", "data")},
        "config.data.path": "data",
        "config.data.valid": "valid",
        "corpus.sha256": load_corpus(tmp_path / "data", tmp_path / "valid").sha256,
    } | changes
    write_run(
        tmp_path / "runs" / f"{name}-seed{seed}",
        [8.0, 4.0, 2.0 + seed],
        kind=planned["mode"],
        seed=seed,
        changes=changes,
    )


def measure(script, tmp_path, monkeypatch, *more):
    files = {"--data": "data", "--valid": "valid", "--out": "runs"}
    flags = [text for flag, name in files.items() for text in (flag, str(tmp_path / name))]
    monkeypatch.setattr(sys, "argv", ["language_models.py", *flags, *more])
    script.main()
    return json.loads((tmp_path / "results.json").read_text())


def test_as_many_seeds_as_were_asked_for(script, tmp_path, monkeypatch):
    written = measure(script, tmp_path, monkeypatch, "--only", "gpt", "--seeds", "2")["gpt"]
    side = written["sides"]["b"]
    assert written["seeds"] == 2
    assert side["losses"][-1] == 3.5
    assert [(run["path"], run["seed"]) for run in side["runs"]] == [
        ("gpt-tiny-moe-seed1", 1),
        ("gpt-tiny-moe-seed2", 2),
    ]
    assert side["runs"][1]["steps"] == [0.0, 10.0, 20.0]
    assert side["runs"][1]["losses"] == [8.0, 4.0, 4.0]


def test_a_section_says_for_itself_where_it_is_from(script, tmp_path, monkeypatch):
    before = measure(script, tmp_path, monkeypatch, "--only", "gpt", "--seeds", "2")
    monkeypatch.setattr(script, "commit", lambda: "def")
    after = measure(script, tmp_path, monkeypatch, "--only", "txl", "--seeds", "1")
    assert after["gpt"] == before["gpt"]
    assert (after["gpt"]["commit"], after["gpt"]["seeds"]) == ("abc", 2)
    assert (after["txl"]["commit"], after["txl"]["seeds"]) == ("def", 1)
    assert set(after) == {"gpt", "txl"}


@pytest.mark.parametrize("only", ["gpt", "upcycling"])
def test_finished_runs_of_other_data_are_not_measured(only, script, tmp_path, monkeypatch):
    (tmp_path / "valid").write_text("something else")
    with pytest.raises(SystemExit, match=r"gpt-tiny(-moe)?-seed1 was trained on other data than .*data and .*valid"):
        measure(script, tmp_path, monkeypatch, "--only", only)


@pytest.mark.parametrize("option", ["model.d_model", "moe.top_k", "optim.lr", "data.eval_sequences"])
def test_finished_runs_of_a_recipe_that_has_changed(option, script, tmp_path, monkeypatch):
    write_finished(tmp_path, "gpt-tiny", 4, **{f"config.{option}": 99})
    section = option.partition(".")[0]
    with pytest.raises(SystemExit, match=rf"recipe gpt-tiny had another {section} for .*gpt-tiny-seed4"):
        measure(script, tmp_path, monkeypatch, "--only", "gpt", "--seeds", "4")


def test_upcycling_needs_the_dense_runs(script, tmp_path, monkeypatch):
    with pytest.raises(SystemExit, match=r"goes on from .*gpt-tiny-seed1, which is no finished run"):
        measure(script, tmp_path, monkeypatch, "--only", "upcycling")


def test_no_seeds(script, tmp_path, monkeypatch):
    with pytest.raises(SystemExit, match="--seeds must be at least 1; got 0"):
        measure(script, tmp_path, monkeypatch, "--only", "gpt", "--seeds", "0")
