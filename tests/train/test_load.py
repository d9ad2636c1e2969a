"""`--monitor` and `fastmoe report`."""

import json
import shutil

import pytest
from rich.console import Console
from tiny_run import as_flags, change, finish, start, torchrun

from fastmoe import cli
from fastmoe.monitor.sinks.jsonl import read_jsonl
from fastmoe.train.run import run, set_up
from fastmoe.train.world import World, find_device


@pytest.fixture
def watched(tiny):
    return change(tiny, run={"monitor": True})


def train(config):
    world, console = World(find_device("cpu", 0)), Console(quiet=True)
    run(set_up(config, world, console), console)


def test_monitor_writes_its_files(watched):
    train(watched)
    folder = watched.run.out / "moe"
    records = read_jsonl(folder / "load.jsonl")
    assert [step for step, _ in records] == [2, 4, 6, 8, 10, 12]
    for _, snapshot in records:
        assert len(snapshot) == 2
        for load in snapshot.values():  # 2 steps of 2 micro-steps; 4 sequences of 16 tokens, top-2
            assert (load.passes, load.tokens, load.rows) == (4, 2 * 4 * 16, 2 * 4 * 16 * 2)
    assert (folder / "load.png").stat().st_size > 5000
    assert list((folder / "tensorboard" / "load").glob("events*"))
    assert not (watched.run.out / "dense" / "load.jsonl").exists()


def test_a_resumed_run_goes_on_where_the_checkpoint_is(watched):
    train(watched)
    folder = watched.run.out / "moe"
    whole = (folder / "load.jsonl").read_bytes()
    for kind in ("dense", "moe"):
        shutil.rmtree(watched.run.out / kind / "step-00000012")
    with (folder / "load.jsonl").open("ab") as file:
        file.write(b'{"step": 14, "lay')
    train(change(watched, run={"resume": True}))
    assert [step for step, _ in read_jsonl(folder / "load.jsonl")] == [2, 4, 6, 8, 10, 12]
    assert (folder / "load.jsonl").read_bytes() == whole


def test_two_processes_write_the_load_of_both(watched):
    config = change(watched, mode="moe", parallel={"ep": 2}, run={"tensorboard": False})
    finish(start(as_flags(config), torchrun(2)))
    records = read_jsonl(config.run.out / "moe" / "load.jsonl")
    assert [step for step, _ in records] == [2, 4, 6, 8, 10, 12]
    assert {load.rows for _, snapshot in records for load in snapshot.values()} == {2 * 4 * 16 * 2}


def test_report_of_an_interrupted_run(watched, capsys):
    train(watched)
    out = watched.run.out
    (out / "results.json").unlink()
    with (out / "moe" / "load.jsonl").open("ab") as file:
        file.write(b'{"step": 14, "lay')
    assert cli.main(["report", str(out)]) == 0
    text = (out / "report.html").read_text(encoding="utf-8")
    assert text.count('class="plotly-graph-div"') == 3
    assert "MoE, held-out" in text
    assert str(out / "report.html") in capsys.readouterr().out


def test_report_from_results_alone(tiny, tmp_path):
    tiny.run.out.mkdir()
    history = {"losses": [3.0, 2.0], "valid_steps": [2], "valid_losses": [2.5]}
    (tiny.run.out / "results.json").write_text(json.dumps({"histories": {"dense": history}}))
    assert cli.main(["report", str(tiny.run.out), "--out", str(tmp_path / "new" / "page.html")]) == 0
    text = (tmp_path / "new" / "page.html").read_text(encoding="utf-8")
    assert text.count('class="plotly-graph-div"') == 1


@pytest.mark.parametrize(
    "content", [None, {}, {"results.json": "{"}, {"moe/load.jsonl": "{}\n"}, {"moe/step-1/fastmoe.json": ""}]
)
@pytest.mark.filterwarnings("ignore:.*cannot be read")
def test_report_where_there_is_no_run(content, tmp_path, capsys):
    folder = tmp_path / "run"
    if content is not None:
        folder.mkdir()
        for name, text in content.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(text)
    assert cli.main(["report", str(folder)]) == 2
    assert str(folder) in capsys.readouterr().err
