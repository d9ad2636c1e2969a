"""What tests of whole runs share."""

import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

from fastmoe.train import checkpoint
from fastmoe.train.corpus import load_corpus
from fastmoe.train.options import to_plain
from fastmoe.train.trainer import Trainer
from fastmoe.train.world import World, find_device

LSTM = {"arch": "lstm", "n_layer": 6, "n_head": 6}
"""The fields that it lacks, as they are by default."""


def change(config, **sections):
    """`config` with some fields of some sections changed: change(config, run={"resume": True}, mode="moe")."""
    changes = {
        name: replace(getattr(config, name), **given) if isinstance(given, dict) else given
        for name, given in sections.items()
    }
    return replace(config, **changes)


def make_trainer(config, kind="moe"):
    return Trainer(config, kind, load_corpus(config.data.path), World(find_device("cpu", 0)))


def as_flags(config):
    """The command line that gives `config`."""
    plain = to_plain(config)
    flags = ["--mode", plain["mode"], "--data", plain["data"].pop("path")]
    for section in ("model", "moe", "data", "optim", "parallel", "run"):
        for name, value in plain[section].items():
            flag = name.replace("_", "-")
            if isinstance(value, bool):
                flags.append(f"--{flag}" if value else f"--no-{flag}")
            elif isinstance(value, dict):
                flags += [f"--{flag}", *(f"{key}={item}" for key, item in value.items())] if value else []
            elif value is not None:
                flags += [f"--{flag}", str(value)]
    return flags


def losses(out, kind):
    return json.loads((out / "results.json").read_text())["histories"][kind]["losses"]


def newest_step(folder):
    """0 where there is no checkpoint."""
    return max((int(path.name.removeprefix("step-")) for path in checkpoint.checkpoints(folder)), default=0)


def torchrun(processes, *options):
    """A launcher for `start`."""
    run = ("-m", "torch.distributed.run", "--standalone", *options, "--nproc-per-node", str(processes))
    return (*run, "-m", "--", "fastmoe", "train")


def start(arguments, launcher=("-m", "fastmoe", "train"), **variables):
    """`fastmoe train` in a process of its own, one thread, its output in a pipe."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2]), **variables}
    return subprocess.Popen(
        [sys.executable, *launcher, *arguments],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(process, timeout=240):
    output, _ = process.communicate(timeout=timeout)
    assert process.returncode == 0, output
    return output


def wait_for_checkpoint(folder, process, after_step=0, timeout=200):
    until = time.monotonic() + timeout
    while newest_step(folder) <= after_step:
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < until
        time.sleep(0.02)
