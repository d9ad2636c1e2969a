"""A run small enough to be trained within a second."""

import pytest
import torch
from tiny_run import change

from fastmoe.train.config import DataConfig, ModelConfig, MoEConfig, OptimConfig, RunConfig, TrainConfig


@pytest.fixture(autouse=True)
def one_thread():
    """As the processes that tests start; more would only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


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
        run=RunConfig(
            out=tmp_path / "run", log_every=2, eval_every=5, checkpoint_every=4, sample_bytes=20, device="cpu"
        ),
    )


@pytest.fixture
def long(tiny):
    """Long enough to be stopped on its way; a checkpoint at every step."""
    optim = {"steps": 200, "lr": 1e-3}
    return change(tiny, optim=optim, run={"checkpoint_every": 1, "eval_every": 50, "tensorboard": False})
