"""Runs of many processes: the same losses as one, checkpoints for any other number, and an end when one fails."""

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import time

import pytest
import torch.distributed as dist
from tiny_run import LSTM, as_flags, change, finish, losses, start, torchrun, wait_for_checkpoint

from fastmoe.train import checkpoint
from fastmoe.train.command import main

pytestmark = pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="PyTorch without gloo")

LAYOUTS = {
    "two": (2, {}),
    "ep 2": (2, {"ep": 2}),
    "ep 2, fsdp, chunks": (2, {"ep": 2, "engine": "fsdp", "ep_chunks": 2, "suppress_duplicates": True}),
    "dp 2, ep 2": (4, {"ep": 2}),
    "dp 2, ep 2, fsdp": (4, {"ep": 2, "engine": "fsdp"}),
}
SLOW = ("dp 2, ep 2", "dp 2, ep 2, fsdp")


@pytest.fixture
def exact(tiny):
    """Without dropout, whose numbers depend on the process; in the last evaluation pass all but one have no window."""
    sizes = {"data": {"eval_sequences": 33}, "optim": {"batch_size": 8}}
    return change(tiny, model={"dropout": 0.0}, run={"tensorboard": False}, **sizes)


def results(config):
    return json.loads((config.run.out / "results.json").read_text())


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] if n in SLOW else []) for n in LAYOUTS])
def test_many_processes_train_as_one_does(exact, tmp_path, name):
    """Balance losses included. The checkpoint on the way goes on alike on one process."""
    number, parallel = LAYOUTS[name]
    many = change(exact, parallel=parallel, run={"out": tmp_path / "many"})
    running = start(as_flags(many), torchrun(number))
    assert main(as_flags(exact)) == 0
    assert finish(running).count("held-out loss after 12 steps") == 1
    assert results(many)["processes"] == number

    resumed = change(exact, run={"out": tmp_path / "resumed", "resume": True})
    for kind in ("dense", "moe"):
        shutil.copytree(many.run.out / kind / "step-00000008", resumed.run.out / kind / "step-00000008")
    assert main(as_flags(resumed)) == 0
    for config in (many, resumed):
        for kind in ("dense", "moe"):
            assert losses(config.run.out, kind) == pytest.approx(losses(exact.run.out, kind), rel=1e-4)
            found, expected = (results(c)["results"][kind] for c in (config, exact))
            for figure in ("valid_loss", "test_loss", "total_params", "active_params"):
                assert found[figure] == pytest.approx(expected[figure], rel=1e-4), figure
        assert results(config)["histories"]["moe"]["loads"] == results(exact)["histories"]["moe"]["loads"]


def test_two_processes_remember_as_one_does(exact, tmp_path):
    """Each its own streams; the last bytes of the held-out text, which do not divide, count once."""
    one = change(exact, mode="moe", model=LSTM, data={"eval_sequences": 0}, optim={"steps": 4})
    two = change(one, run={"out": tmp_path / "two"})
    running = start([*as_flags(two), "--ep", "2"], torchrun(2))
    assert main(as_flags(one)) == 0
    finish(running)
    assert losses(two.run.out, "moe") == pytest.approx(losses(one.run.out, "moe"), rel=1e-4)
    for figure in ("valid_loss", "test_loss"):
        assert results(two)["results"]["moe"][figure] == pytest.approx(results(one)["results"]["moe"][figure], rel=1e-4)
    assert len(list((two.run.out / "moe" / "step-00000004" / "memory").glob("*.pt"))) == 4


def test_a_checkpoint_of_one_process_goes_on_on_two(exact, tmp_path):
    config = change(exact, mode="moe")
    assert main(as_flags(config)) == 0
    checkpoint.delete(config.run.out / "moe" / "step-00000012")
    expected = losses(config.run.out, "moe")
    finish(start([*as_flags(config), "--resume", "--ep", "2", "--engine", "fsdp"], torchrun(2)))
    assert losses(config.run.out, "moe") == pytest.approx(expected, rel=1e-4)


def test_two_processes_stop_together(long):
    config = change(long, parallel={"ep": 2}, run={"checkpoint_every": 20})
    process = start(as_flags(config), torchrun(2))
    wait_for_checkpoint(config.run.out / "moe", process)
    process.send_signal(signal.SIGTERM)
    assert "stopped by a signal; saved" in process.communicate(timeout=60)[0]
    assert checkpoint.newest(config.run.out / "dense", checkpoint.read_extra)["step"] > 0


FAILING = """
import os, sys
from torch.distributed.checkpoint import FileSystemWriter
from fastmoe.dispatch import AllToAllDispatcher
from fastmoe.train.command import main

owner, name = {"exchange": (AllToAllDispatcher, "_run"), "save": (FileSystemWriter, "write_data")}[os.environ["WHERE"]]
real, calls = getattr(owner, name), int(os.environ["CALLS"])

def failing(*args):
    global calls
    calls -= 1
    if not calls and os.environ["RANK"] == "1":
        os.kill(os.getpid(), int(os.environ["SIGNAL"]))
    return real(*args)

setattr(owner, name, failing)
sys.exit(main(sys.argv[1:]))
"""


@contextlib.contextmanager
def failing_processes(number, config, **failure):
    """Of one run, without torchrun's watch; the second does to itself what `FAILING` is told to."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": str(number)}
    variables = {name: str(value) for name, value in failure.items()} | {"LOCAL_RANK": "0"} | address
    running = [start(as_flags(config), ("-c", FAILING), **variables, RANK=str(rank)) for rank in range(number)]
    try:
        yield running
    finally:
        for process in running:
            process.kill()
            process.wait()
            process.stdout.close()


IN_THIRD_STEP = {  # two layers; one pass to evaluate, two in each step
    "dies": (2, {"WHERE": "exchange", "CALLS": 13, "SIGNAL": int(signal.SIGKILL)}),
    "hangs": (2, {"WHERE": "exchange", "CALLS": 13, "SIGNAL": int(signal.SIGSTOP)}),
    "dies while saving": (2, {"WHERE": "save", "CALLS": 3, "SIGNAL": int(signal.SIGKILL)}),
    "hangs, where four share experts in twos": (4, {"WHERE": "exchange", "CALLS": 13, "SIGNAL": int(signal.SIGSTOP)}),
}


@pytest.mark.parametrize(
    "how", [pytest.param(how, marks=[pytest.mark.slow] if "four" in how else []) for how in IN_THIRD_STEP]
)
def test_when_a_process_fails_the_other_ends_and_says_where(long, how):
    number, failure = IN_THIRD_STEP[how]
    config = change(long, mode="moe", optim={"batch_size": 8}, parallel={"ep": 2, "timeout": 5})
    with failing_processes(number, config, **failure) as running:
        wait_for_checkpoint(config.run.out / "moe", running[0], after_step=1)
        started = time.monotonic()
        output, _ = running[0].communicate(timeout=100)
        took = time.monotonic() - started
    assert running[0].returncode == 1, output
    layer = "" if "saving" in how else "MoE layer 'blocks.0.mlp', forward pass 7: "
    assert f"\nfastmoe train: moe, step 3: {layer}" in output
    assert took < 20
    assert checkpoint.newest(config.run.out / "moe", checkpoint.read_extra)["step"] == 2


def test_torchrun_restarts_a_run_that_lost_a_process(long, tmp_path):
    config = change(long, mode="moe", optim={"steps": 30}, parallel={"ep": 2, "timeout": 20})
    undisturbed = change(config, run={"out": tmp_path / "undisturbed", "checkpoint_every": 30})
    whole = start(as_flags(undisturbed), torchrun(2))
    process = start([*as_flags(config), "--resume"], torchrun(2, "--max-restarts", "1"))
    wait_for_checkpoint(config.run.out / "moe", process, after_step=3)
    os.kill(workers(process)[1], signal.SIGKILL)
    assert "resumed from" in finish(process)
    finish(whole)
    assert losses(config.run.out, "moe") == losses(undisturbed.run.out, "moe")


def workers(torchrun):
    found = subprocess.run(["pgrep", "-P", str(torchrun.pid)], capture_output=True, text=True, check=True)
    return [int(pid) for pid in found.stdout.split()]
