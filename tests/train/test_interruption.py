"""Signals, kills and processes: runs in processes of their own."""

import json
import random
import signal
import time

import pytest
from tiny_run import as_flags, change, start

from fastmoe.train import checkpoint


def finish(process, timeout=120):
    output, _ = process.communicate(timeout=timeout)
    assert process.returncode == 0, output
    return output


def wait_for_checkpoint(folder, process, after_step=0, timeout=60):
    until = time.monotonic() + timeout
    while newest_step(folder) <= after_step:
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < until
        time.sleep(0.02)


def newest_step(folder):
    return max((int(path.stem.removeprefix("step-")) for path in checkpoint.checkpoints(folder)), default=0)


def losses(out, kind):
    return json.loads((out / "results.json").read_text())["histories"][kind]["losses"]


@pytest.fixture
def long(tiny):
    """Long enough to be stopped on its way; a checkpoint at every step."""
    optim = {"steps": 200, "lr": 1e-3}
    return change(tiny, optim=optim, run={"checkpoint_every": 1, "eval_every": 50, "tensorboard": False})


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_ends_cleanly_and_the_run_goes_on_exactly(long, tmp_path, number):
    whole = change(long, run={"out": tmp_path / "whole", "checkpoint_every": 200})
    uninterrupted, process = start(as_flags(whole)), start(as_flags(long))
    wait_for_checkpoint(long.run.out / "moe", process)
    process.send_signal(number)
    assert "stopped by a signal; saved" in finish(process)
    stopped_at = checkpoint.load_newest(long.run.out / "moe")[1]["step"]
    assert 0 < stopped_at < 200
    finish(start([*as_flags(long), "--resume", "--checkpoint-every", "200"]))
    finish(uninterrupted)
    for kind in ("dense", "moe"):
        assert losses(long.run.out, kind) == losses(whole.run.out, kind)


@pytest.mark.parametrize("kills", [3, pytest.param(20, marks=pytest.mark.slow)])
def test_a_kill_at_any_moment_leaves_a_loadable_checkpoint(long, kills):
    moments = random.Random(kills)
    flags = as_flags(change(long, optim={"steps": 100_000}))
    folder = long.run.out / "moe"
    for _ in range(kills):
        before = newest_step(folder)
        process = start([*flags, "--resume", "--mode", "moe"])
        wait_for_checkpoint(folder, process, after_step=before)
        time.sleep(moments.random() / 4)
        process.kill()
        process.communicate()
        _, state = checkpoint.load_newest(folder)
        assert state["step"] == len(state["history"]["losses"]) == newest_step(folder) > before


@pytest.mark.parametrize("kind", ["dense", "moe"])
def test_two_processes_train_as_one_does(tiny, tmp_path, kind):
    """The MoE is tested without its balance loss, which each process takes over its own tokens."""
    one = change(tiny, model={"dropout": 0.0}, moe={"aux_loss_weight": 0.0}, run={"tensorboard": False})
    two = change(one, run={"out": tmp_path / "two"})
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "fastmoe", "train")
    together = start([*as_flags(two), "--mode", kind], torchrun)
    finish(start([*as_flags(one), "--mode", kind]))
    output = finish(together)
    assert output.count("held-out loss after 12 steps") == 1
    assert losses(two.run.out, kind) == pytest.approx(losses(one.run.out, kind), rel=1e-4)
    written = [json.loads((config.run.out / "results.json").read_text()) for config in (one, two)]
    assert [result["processes"] for result in written] == [1, 2]
    valid = [result["results"][kind]["valid_loss"] for result in written]
    assert valid[0] == pytest.approx(valid[1], rel=1e-4)


def test_two_processes_stop_together_and_resume(long):
    config = change(long, run={"checkpoint_every": 20})
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "fastmoe", "train")
    process = start(as_flags(config), torchrun)
    wait_for_checkpoint(config.run.out / "moe", process)
    process.send_signal(signal.SIGTERM)
    assert "stopped by a signal; saved" in process.communicate(timeout=60)[0]
    assert checkpoint.load_newest(config.run.out / "dense")[1]["step"] > 0
