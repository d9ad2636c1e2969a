"""Signals and kills: runs in a process of their own."""

import random
import signal
import time

import pytest
from tiny_run import as_flags, change, finish, losses, make_trainer, newest_step, start, wait_for_checkpoint

from fastmoe.train import checkpoint


def test_signals_save_and_end_cleanly_and_the_run_goes_on_exactly(long, tmp_path):
    long = change(long, run={"checkpoint_every": 20})
    whole = change(long, run={"out": tmp_path / "whole", "checkpoint_every": 200})
    uninterrupted, step = start(as_flags(whole)), 0
    for number in (signal.SIGINT, signal.SIGTERM):
        process = start([*as_flags(long), "--resume"])
        wait_for_checkpoint(long.run.out / "moe", process, after_step=step)
        process.send_signal(number)
        assert "stopped by a signal; saved" in finish(process)
        before, step = step, newest_step(long.run.out / "moe")
        assert before < step < 200
    finish(start([*as_flags(long), "--resume"]))
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
        trainer = make_trainer(long)
        checkpoint.newest(folder, trainer.restore)
        assert trainer.step == len(trainer.history.losses) == newest_step(folder) > before
