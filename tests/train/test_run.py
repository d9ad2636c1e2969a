"""Whole runs in this process: what they print and leave behind."""

import json

import pytest
import torch
from tiny_run import as_flags, change, losses, make_trainer

from fastmoe.train import checkpoint
from fastmoe.train.command import main
from fastmoe.train.loop import train
from fastmoe.train.trainer import Trainer


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_compare_leaves_all_artefacts(tiny, capsys):
    assert main(as_flags(tiny)) == 0
    out = tiny.run.out
    assert names(out) == ["curves.png", "dense", "expert_load.png", "moe", "results.json", "sample.txt"]
    for kind in ("dense", "moe"):
        assert names(out / kind) == ["step-00000008", "step-00000012", "tensorboard"]
        assert any(path.stat().st_size > 500 for path in (out / kind / "tensorboard").iterdir())
    for name in ("curves.png", "expert_load.png"):
        assert (out / name).read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    for words in (
        "held-out loss after 12 steps",
        "steps to the dense model's final loss",
        "tokens/s",
        "total parameters",
    ):
        assert words in printed


def test_results_hold_the_figures_of_the_table(tiny):
    main(as_flags(tiny))
    written = json.loads((tiny.run.out / "results.json").read_text())
    dense, moe = written["results"]["dense"], written["results"]["moe"]
    assert dense["steps"] == moe["steps"] == 12
    assert dense["steps_to_dense_loss"] <= 12
    assert dense["total_params"] == dense["active_params"] < moe["active_params"] < moe["total_params"]
    assert min(dense["seconds"], moe["seconds"]) > 0
    assert written["histories"]["moe"]["valid_losses"][-1] == moe["valid_loss"]
    assert written["machine"]["torch"] == torch.__version__
    assert written["config"]["optim"]["steps"] == 12
    assert len(written["corpus"]["sha256"]) == 64


@pytest.mark.parametrize("mode", ["dense", "moe"])
def test_one_model_can_be_trained_alone(tiny, mode, capsys):
    assert main([*as_flags(tiny), "--mode", mode]) == 0
    assert (tiny.run.out / mode).is_dir()
    assert (tiny.run.out / "expert_load.png").exists() == (mode == "moe")
    assert "dense model's final loss" not in capsys.readouterr().out


def test_dense_and_moe_see_the_same_batches_alone_or_side_by_side(tiny, tmp_path):
    alone = change(tiny, run={"out": tmp_path / "alone"})
    main([*as_flags(tiny), "--mode", "compare"])
    main([*as_flags(alone), "--mode", "moe"])
    losses = [
        json.loads((folder / "results.json").read_text())["histories"]["moe"]["losses"]
        for folder in (tiny.run.out, tmp_path / "alone")
    ]
    assert losses[0] == losses[1]


def test_an_earlier_run_is_neither_overwritten_nor_mixed_in_silently(tiny, capsys):
    assert main(as_flags(tiny)) == 0
    assert main(as_flags(tiny)) == 2
    assert "is of an earlier run: give --resume, --overwrite or another --out" in capsys.readouterr().err
    assert main([*as_flags(tiny), "--overwrite", "--steps", "4"]) == 0
    assert names(tiny.run.out / "moe") == ["step-00000004", "tensorboard"]


def test_resume_without_a_checkpoint_starts_and_after_the_end_only_reports(tiny, capsys):
    assert main([*as_flags(tiny), "--resume"]) == 0
    assert "no checkpoint in" in capsys.readouterr().out
    first = json.loads((tiny.run.out / "results.json").read_text())
    assert main([*as_flags(tiny), "--resume"]) == 0
    assert json.loads((tiny.run.out / "results.json").read_text())["results"] == first["results"]


def test_resume_passes_over_a_damaged_checkpoint_and_replaces_it(tiny):
    config = change(tiny, mode="moe")
    assert main(as_flags(config)) == 0
    whole = losses(config.run.out, "moe")
    newest = config.run.out / "moe" / "step-00000012"
    (newest / "fastmoe.json").unlink()
    with pytest.warns(UserWarning, match="step-00000012 cannot be read, trying the one before it"):
        assert main([*as_flags(config), "--resume"]) == 0
    assert losses(config.run.out, "moe") == whole
    assert checkpoint.read_extra(newest)["step"] == 12


def test_results_of_another_model_are_not_written_over_in_silence(tiny, capsys):
    assert main([*as_flags(tiny), "--mode", "dense"]) == 0
    assert main([*as_flags(tiny), "--mode", "moe"]) == 2
    assert "results.json is of a run of dense, this one is of moe: give another --out" in capsys.readouterr().err
    assert main([*as_flags(tiny), "--mode", "moe", "--overwrite"]) == 0
    assert list(json.loads((tiny.run.out / "results.json").read_text())["histories"]) == ["moe"]


@pytest.mark.parametrize("content", ['{"machine": {', "[]", '{"histories": null}'])
def test_results_that_a_kill_cut_off_are_written_again(tiny, content):
    assert main([*as_flags(tiny), "--mode", "dense"]) == 0
    results = tiny.run.out / "results.json"
    results.write_text(content)
    assert main([*as_flags(tiny), "--mode", "dense", "--resume"]) == 0
    assert json.loads(results.read_text())["results"]["dense"]["steps"] == 12


def test_a_run_of_one_model_goes_on_as_one_of_two(tiny):
    assert main([*as_flags(tiny), "--mode", "dense"]) == 0
    assert main([*as_flags(tiny), "--mode", "compare", "--resume"]) == 0
    assert list(json.loads((tiny.run.out / "results.json").read_text())["histories"]) == ["dense", "moe"]


def test_out_must_be_a_folder(tiny, tmp_path, capsys):
    file = tmp_path / "file"
    file.write_text("")
    assert main([*as_flags(tiny), "--out", str(file)]) == 2
    assert "file is a file" in capsys.readouterr().err


def test_a_run_that_ends_where_it_was_stopped_evaluates_there(tiny):
    config = change(tiny, mode="dense")
    stopped = make_trainer(config, "dense")
    assert not train([stopped], [], lambda: stopped.step == 7)
    assert main([*as_flags(config), "--resume", "--steps", "7"]) == 0
    history = json.loads((tiny.run.out / "results.json").read_text())["histories"]["dense"]
    assert history["valid_steps"] == [0, 5, 7]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "nowhere.txt"], "no such data file: nowhere.txt"),
        (["--n-head", "3"], "d_model must be a multiple of n_head"),
        (["--batch-size", "3"], "batch_size must be a multiple"),
        (["--ep", "2"], "ep must divide the number of processes; got ep=2 and 1: start"),
        (["--device", "tpu?"], "device must be auto, cpu, cuda or cuda:N; got 'tpu?'"),
    ],
)
def test_what_cannot_be_run_is_said_in_one_line(tiny, capsys, arguments, message):
    assert main([*as_flags(tiny), *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("fastmoe train: ")
    assert message in error


def test_diverging_training_fails_with_a_message(tiny, capsys):
    assert main([*as_flags(tiny), "--mode", "dense", "--lr", "1e30", "--grad-clip", "0", "--warmup-steps", "0"]) == 1
    assert "try a smaller lr" in capsys.readouterr().err


@pytest.mark.parametrize("error", [RuntimeError("out of memory"), OSError(28, "No space left on device")])
def test_what_goes_wrong_in_a_step_is_said_with_its_number(tiny, capsys, monkeypatch, error):
    save = Trainer.save

    def failing(trainer):
        if trainer.step == 8:
            raise error
        save(trainer)

    monkeypatch.setattr(Trainer, "save", failing)
    assert main([*as_flags(tiny), "--mode", "dense"]) == 1
    assert f"fastmoe train: dense, step 8: {error}" in capsys.readouterr().err
