"""What tests of whole runs share."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

from fastmoe.train.corpus import load_corpus
from fastmoe.train.options import to_plain
from fastmoe.train.trainer import Trainer
from fastmoe.train.world import World, find_device


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
    for section in ("model", "moe", "data", "optim", "run"):
        for name, value in plain[section].items():
            flag = name.replace("_", "-")
            if isinstance(value, bool):
                flags.append(f"--{flag}" if value else f"--no-{flag}")
            elif isinstance(value, dict):
                flags += [f"--{flag}", *(f"{key}={item}" for key, item in value.items())] if value else []
            elif value is not None:
                flags += [f"--{flag}", str(value)]
    return flags


def start(arguments, launcher=("-m", "fastmoe", "train")):
    """`fastmoe train` in a process of its own, one thread, its output in a pipe."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    return subprocess.Popen(
        [sys.executable, *launcher, *arguments],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
