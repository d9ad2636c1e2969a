"""`fastmoe compare` on made-up runs."""

import json

import pytest

from fastmoe.cli import main
from fastmoe.train.compare import find_runs, read_run, read_side


def write_run(folder, losses, kind="dense", step_seconds=1.0, flops=2.0, sha256="same", lr=0.1, both=None):
    """A finished run as results.json has it, evaluated every 10 steps; a step is of 8 tokens."""
    steps = [10 * i for i in range(len(losses))]
    history = {
        "valid_steps": steps,
        "valid_seconds": [step_seconds * step for step in steps],
        "valid_losses": losses,
    }
    kinds = [kind] if both is None else ["dense", "moe"]
    written = {
        "machine": {"cpu": "some CPU"},
        "corpus": {"name": "text", "sha256": sha256},
        "config": {"optim": {"batch_size": 4, "lr": lr}, "model": {"block_size": 2}, "moe": {}},
        "results": {each: {"train_flops_per_token": flops} for each in kinds},
        "histories": {kind: history} if both is None else {"dense": history, "moe": history | {"valid_losses": both}},
    }
    folder.mkdir(parents=True)
    (folder / "results.json").write_text(json.dumps(written))
    return str(folder)


def compare(a, b, out):
    assert main(["compare", a, b, "--out", str(out)]) == 0
    assert (out / "compare.png").read_bytes().startswith(b"\x89PNG")
    return json.loads((out / "compare.json").read_text())


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
        write_run(tmp_path / f"b-seed{seed}", [8.0, 4.0, last])
    found = compare(a, str(tmp_path / "b-seed*"), tmp_path / "out")
    side = found["sides"]["b"]
    assert (side["losses"], side["spread"]) == ([8.0, 4.0, 2.0], [0.0, 0.0, 1.0])
    assert found["b_reaches_it_after"]["steps"] == 15.0
    assert found["b_reaches_it_after_steps_by_run"] == [pytest.approx(10 + 10 / 3), 15.0, 20.0]
    assert "2.000 bits/byte after 20 steps, standard deviation 1.000 over 3 runs" in capsys.readouterr().out


def test_a_list_of_paths_and_patterns(tmp_path):
    for name in ("x1", "x2", "y"):
        (tmp_path / name).mkdir()
    found = find_runs(f"{tmp_path}/y, {tmp_path}/x*")
    assert [path.name for path in found] == ["y", "x1", "x2"]


def test_a_loss_that_is_never_reached(tmp_path, capsys):
    a, b = write_run(tmp_path / "a", [8.0, 1.0]), write_run(tmp_path / "b", [8.0, 2.0])
    found = compare(a, b, tmp_path / "out")
    assert found["b_reaches_it_after"] == {"steps": None, "seconds": None, "flops": None}
    assert f"{b} did not reach {a}'s final loss" in capsys.readouterr().out


def test_one_model_of_a_run_of_two(tmp_path):
    folder = tmp_path / "twins"
    write_run(folder, [8.0, 4.0], both=[8.0, 3.0])
    for kind in ("dense", "moe"):
        (folder / kind).mkdir()
    assert read_run(folder / "moe").losses == [8.0, 3.0]
    with pytest.raises(ValueError, match=r"has two models: give .*dense or .*moe"):
        read_run(folder)


def test_what_cannot_be_compared(tmp_path, capsys):
    a = write_run(tmp_path / "a", [8.0, 4.0])
    longer = write_run(tmp_path / "longer", [8.0, 4.0, 3.0])
    faster = write_run(tmp_path / "faster", [8.0, 4.0], lr=1.0)
    other = write_run(tmp_path / "other", [8.0, 4.0], sha256="other")
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "results.json").write_text("{}")
    for b, message in (
        (str(tmp_path / "nowhere*"), "no such run"),
        (str(tmp_path / "empty"), "is no finished run"),
        (str(tmp_path / "broken"), "cannot be read"),
        (f"{a},{longer}", "were not evaluated at the same steps"),
        (f"{a},{faster}", "are of one side, and differ in optim"),
        (other, "learned other data"),
        (",", "at least one run; got none"),
    ):
        assert main(["compare", a, b, "--out", str(tmp_path / "out")]) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_side_of_one_has_no_spread(tmp_path):
    assert read_side(write_run(tmp_path / "a", [8.0, 4.0]), "a").spread == [0.0, 0.0]
