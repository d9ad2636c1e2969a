"""A run small enough to be trained within a second."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from fastmoe.train.config import DataConfig, ModelConfig, MoEConfig, OptimConfig, RunConfig, TrainConfig
from fastmoe.train.corpus import load_corpus
from fastmoe.train.options import to_plain
from fastmoe.train.trainer import Trainer
from fastmoe.train.world import World, find_device


@pytest.fixture
def text_file(tmp_path):
    path = tmp_path / "text.txt"
    path.write_bytes(b"".join(b"%d squared is %d\n" % (i, i * i) for i in range(2000)))
    return path


@pytest.fixture
def tiny(tmp_path, text_file):
    """Dropout and two micro-steps are on, so that tests of exactness cover them."""
    return TrainConfig(
        mode="compare",
        model=ModelConfig(block_size=16, n_layer=2, n_head=2, d_model=16, dropout=0.1),
        moe=MoEConfig(num_experts=4),
        data=DataConfig(path=text_file, eval_sequences=8),
        optim=OptimConfig(steps=12, batch_size=4, grad_accumulation=2, lr=1e-2, warmup_steps=2),
        run=RunConfig(out=tmp_path / "run", log_every=2, eval_every=5, checkpoint_every=4, sample_bytes=20, device="cpu"),
    )


def change(config, **sections):
    """`config` with some fields of some sections changed: change(config, run={"resume": True})."""
    return replace(config, **{name: replace(getattr(config, name), **fields) for name, fields in sections.items()})


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
