"""`fastmoe compare` on made-up runs."""

import json
import subprocess
import sys

import pytest
from finished_runs import write_run

from fastmoe import cli
from fastmoe.train.compare import read_side

NAN, INFINITY = float("nan"), float("inf")


def compare(a, b, out):
    assert cli.main(["compare", a, b, "--out", str(out)]) == 0
    assert (out / "compare.png").read_bytes().startswith(b"\x89PNG")
    return json.loads((out / "compare.json").read_text(), parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))


def refusal(a, b, tmp_path, capsys):
    """What it says of two sides that cannot be compared: one line, and nothing is written."""
    assert cli.main(["compare", a, b, "--out", str(tmp_path / "out")]) == 2
    assert not (tmp_path / "out").exists()
    (line,) = capsys.readouterr().err.splitlines()
    return line.removeprefix("fastmoe compare: ")


def test_when_b_reached_the_final_loss_of_a(tmp_path, capsys):
    a = write_run(tmp_path / "a", [8.0, 5.0, 4.0, 3.0])
    b = write_run(tmp_path / "b", [8.0, 4.0, 2.0, 1.0], kind="moe", step_seconds=3.0, flops=4.0)
    found = compare(a, b, tmp_path / "out")
    assert found["final_loss_of_a"] == 3.0
    assert found["b_reaches_it_after"] == {"steps": 15.0, "seconds": 45.0, "flops": 15 * 8 * 4.0}
    assert found["share_of_a"] == {"steps": 0.5, "seconds": 1.5, "flops": 1.0}
    assert found["sides"]["a"]["flops"] == [0.0, 160.0, 320.0, 480.0]
    assert f"{b} reached {a}'s final loss after 15 steps: 50% of its steps, 150% of its time" in capsys.readouterr().out


def test_seeds_give_a_mean_and_a_spread(tmp_path, capsys):
    a = write_run(tmp_path / "a", [8.0, 5.0, 3.0])
    for seed, last in enumerate((1.0, 2.0, 3.0)):
        write_run(tmp_path / f"b-seed{seed}", [8.0, 4.0, last], seed=seed)
    found = compare(a, str(tmp_path / "b-seed*"), tmp_path / "out")
    side = found["sides"]["b"]
    assert (side["losses"], side["spread"]) == ([8.0, 4.0, 2.0], [0.0, 0.0, 1.0])
    assert found["b_reaches_it_after"]["steps"] == 15.0
    assert found["b_reaches_it_after_steps_by_run"] == [pytest.approx(10 + 10 / 3), 15.0, 20.0]
    assert "2.000 bits/byte after 20 steps, standard deviation 1.000 over 3 runs" in capsys.readouterr().out


def test_the_json_has_the_curve_of_each_run(tmp_path):
    a, b = write_run(tmp_path / "a", [8.0, 5.0]), write_run(tmp_path / "b", [8.0, 4.0], seed=2, step_seconds=3.0)
    (run,) = compare(a, b, tmp_path / "out")["sides"]["b"]["runs"]
    assert run == {"path": b, "seed": 2, "steps": [0.0, 10.0], "seconds": [0.0, 30.0], "losses": [8.0, 4.0]}


def test_a_loss_that_is_never_reached(tmp_path, capsys):
    a, b = write_run(tmp_path / "a", [8.0, 1.0]), write_run(tmp_path / "b", [8.0, 2.0])
    found = compare(a, b, tmp_path / "out")
    assert found["b_reaches_it_after"] == {"steps": None, "seconds": None, "flops": None}
    assert f"{b} did not reach {a}'s final loss" in capsys.readouterr().out


def test_a_run_without_a_step_has_no_share(tmp_path, capsys):
    a, b = write_run(tmp_path / "a", [7.5]), write_run(tmp_path / "b", [8.0, 7.0])
    found = compare(a, b, tmp_path / "out")
    assert found["share_of_a"] == {"steps": None, "seconds": None, "flops": None}
    assert f"{b} reached {a}'s final loss after 5 steps\n" in capsys.readouterr().out


@pytest.mark.parametrize("loss", [NAN, -INFINITY])
def test_a_loss_that_is_not_finite_is_never_reached(loss, tmp_path, capsys):
    a = write_run(tmp_path / "a", [8.0, 6.0, 3.0])
    b = write_run(tmp_path / "b", [8.0, loss, 2.0], changes={"results.dense.valid_loss": loss})
    found = compare(a, b, tmp_path / "out")
    assert found["b_reaches_it_after"]["steps"] == pytest.approx(20 * 5 / 6)
    assert (found["sides"]["b"]["losses"], found["sides"]["b"]["spread"]) == ([8.0, None, 2.0], [0.0, None, 0.0])
    assert found["sides"]["b"]["details"]["figures"]["valid_loss"] is None
    assert "nan%" not in capsys.readouterr().out


def test_one_of_several_seeds_diverged(tmp_path, capsys):
    a = write_run(tmp_path / "a", [8.0, 3.0])
    b = [write_run(tmp_path / f"b{seed}", [8.0, loss], seed=seed) for seed, loss in enumerate((2.0, NAN))]
    found = compare(a, ",".join(b), tmp_path / "out")
    assert found["b_reaches_it_after_steps_by_run"] == [pytest.approx(10 * 5 / 6), None]
    assert "did not reach" in capsys.readouterr().out


@pytest.mark.parametrize("loss", [NAN, INFINITY, -INFINITY])
def test_a_final_loss_to_measure_by_must_be_finite(loss, tmp_path, capsys):
    a, b = write_run(tmp_path / "a", [8.0, loss]), write_run(tmp_path / "b", [8.0, 4.0])
    assert f"{a} ended with a loss that is not finite" in refusal(a, b, tmp_path, capsys)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"config.model.n_layer": 3}, "differ in model"),
        ({"config.moe.top_k": 1}, "differ in moe"),
        ({"config.optim.lr": 1.0}, "differ in optim"),
        ({"config.data.eval_sequences": 8}, "eval_sequences = 8"),
        ({"corpus.sha256": "other"}, "other data"),
        ({"config.run.seed": 1}, "both have seed 1"),
        ({"histories.dense.valid_steps": [0, 11]}, "were not evaluated at the same steps"),
    ],
)
def test_runs_of_a_side_differ_in_their_seed_alone(changes, message, tmp_path, capsys):
    a = write_run(tmp_path / "a", [8.0, 4.0])
    first = write_run(tmp_path / "b1", [8.0, 4.0])
    other = write_run(tmp_path / "b2", [8.0, 4.0], seed=2, changes=changes)
    line = refusal(a, f"{first},{other}", tmp_path, capsys)
    assert message in line
    assert other in line
    assert first in line or a in line


def test_a_dense_model_and_its_twin_are_not_of_one_side(tmp_path, capsys):
    dense = write_run(tmp_path / "gpt-tiny", [8.0, 4.0])
    moe = write_run(tmp_path / "gpt-tiny-moe", [8.0, 3.0], kind="moe", seed=2)
    line = refusal(f"{dense}*", moe, tmp_path, capsys)
    assert line == f"{moe} and {dense} are of one side: expected one kind of model; got moe and dense"


@pytest.mark.parametrize("again", ["a", "../runs/a/.", "link"])
def test_a_run_twice_in_a_side(again, tmp_path, capsys):
    a = write_run(tmp_path / "runs" / "a", [8.0, 4.0])
    (tmp_path / "runs" / "link").symlink_to(a)
    other = f"{tmp_path}/runs/{again}"
    for pair in (f"{a},{other}", f"{other},{a}"):
        assert refusal(a, pair, tmp_path, capsys).endswith("is given twice")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"corpus.sha256": "other"}, "{b} and {a} learned other data: their losses cannot be compared"),
        ({"config.data.eval_sequences": 8}, "{b} was evaluated with eval_sequences = 8, {a} with 16"),
        ({"config.model.block_size": 4}, "{b} was evaluated with block_size = 4, {a} with 2"),
        ({"config.model.arch": "lstm"}, "train both with --eval-sequences 0"),
    ],
)
def test_sides_that_were_evaluated_otherwise(changes, message, tmp_path, capsys):
    a = write_run(tmp_path / "a", [8.0, 4.0])
    b = write_run(tmp_path / "b", [8.0, 4.0], changes=changes)
    assert message.format(a=a, b=b) in refusal(a, b, tmp_path, capsys)


def test_models_with_memory_and_without_on_all_of_the_text(tmp_path):
    everything = {"config.data.eval_sequences": 0}
    a = write_run(tmp_path / "a", [8.0, 4.0], changes=everything)
    b = write_run(tmp_path / "b", [8.0, 4.0], changes=everything | {"config.model.arch": "transformer_xl"})
    compare(a, b, tmp_path / "out")


def test_what_is_no_side(tmp_path, capsys):
    a = write_run(tmp_path / "a", [8.0, 4.0])
    (tmp_path / "empty").mkdir()
    for b, message in (
        (str(tmp_path / "nowhere*"), "no such run"),
        (str(tmp_path / "empty"), "is no finished run"),
        (",", "at least one run; got none"),
        ("", "at least one run; got none"),
    ):
        assert message in refusal(a, b, tmp_path, capsys)


def test_a_side_of_one_has_no_spread(tmp_path):
    assert read_side(write_run(tmp_path / "a", [8.0, 4.0]), "a").spread == [0.0, 0.0]


def test_the_command_needs_what_it_imports():
    extras = sorted({name for command in cli.COMMANDS.values() for name in command.needs})
    module = cli.COMMANDS["compare"].module
    code = f"import sys, {module}; print(*(name for name in {extras} if name in sys.modules))"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.split() == sorted(cli.COMMANDS["compare"].needs)
