"""A trained dense model goes on in two ways: as it is, and as an MoE whose experts are copies of its blocks.

Experts are as wide as the dense block: top 1 of them costs as much per token, top 2 more, and takes fewer steps:
all ways have the same FLOPs, a fresh optimizer, and see the same data in the same order.
"""

import json
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path

import torch

import fastmoe
from fastmoe.bench.machine import machine
from fastmoe.train import checkpoint
from fastmoe.train.build import build_optimizer
from fastmoe.train.compare import AXES, Side, as_json, check_same_evaluation
from fastmoe.train.compare_plot import plot_sides
from fastmoe.train.compare_runs import read_run
from fastmoe.train.config import OptimConfig, RunConfig, TrainConfig
from fastmoe.train.corpus import load_corpus
from fastmoe.train.models import train_flops_per_token
from fastmoe.train.options import merge, to_plain
from fastmoe.train.trainer import Trainer
from fastmoe.train.world import World

EXPERTS, STEPS, EVALUATIONS = 16, 1000, 10
WAYS = {"gpt-tiny, trained on": None, "upcycled, top 1 of 16": 1, "upcycled, top 2 of 16": 2}


def folder_of(dense: Path, top_k: int | None, out: Path) -> Path:
    return out / f"upcycling-{top_k or 'dense'}-{dense.name.rpartition('-')[2]}"


def go_on(dense: Path, top_k: int | None, out: Path) -> Path:
    """Train a finished dense run on, as it is or with experts; the run's folder, as `fastmoe train` leaves it."""
    torch.set_num_threads(1)
    folder = folder_of(dense, top_k, out)
    if (folder / "results.json").is_file():
        return folder
    trainer = start(dense, top_k)
    trainer.evaluate()
    steps = trainer.config.optim.steps
    due = {round(steps * (i + 1) / EVALUATIONS) for i in range(EVALUATIONS)}
    while trainer.step < steps:
        trainer.take_step()
        if trainer.step in due:
            trainer.evaluate()
    write(trainer, folder)
    return folder


def start(dense: Path, top_k: int | None) -> Trainer:
    """Its newest checkpoint's weights, data in another order than before, a fresh optimizer.

    As many steps as cost what `STEPS` of the dense model do, and a schedule that ends with them.
    """
    before = merge(TrainConfig(), json.loads((dense / "results.json").read_text())["config"])
    config = replace(
        before,
        optim=OptimConfig(steps=STEPS, batch_size=before.optim.batch_size, lr=2e-3, min_lr=2e-4, warmup_steps=30),
        run=RunConfig(out=dense, seed=before.run.seed + 100, device="cpu"),
    )
    corpus = load_corpus(config.data.path, config.data.valid)
    trainer = Trainer(config, "dense", corpus, World(torch.device("cpu")))
    fastmoe.load(trainer.model, None, checkpoint.checkpoints(dense / "dense")[0])
    if top_k is not None:
        cost = train_flops_per_token(trainer.model, config.model)
        fastmoe.moefy(trainer.model, num_experts=EXPERTS, top_k=top_k, init="upcycle")
        dearer = train_flops_per_token(trainer.model, config.model) / cost
        trainer.config = replace(config, optim=replace(config.optim, steps=round(STEPS / dearer)))
        trainer.optimizer = build_optimizer(trainer.model, config.optim)
    return trainer


def write(trainer: Trainer, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    flops = train_flops_per_token(trainer.model, trainer.config.model)
    size = fastmoe.summary(trainer.model)
    figures = {"train_flops_per_token": flops, "total_params": size.total_params, "active_params": size.active_params}
    written = {
        "machine": machine(),
        "corpus": {"name": trainer.corpus.name, "sha256": trainer.corpus.sha256},
        "config": to_plain(trainer.config),
        "results": {"dense": figures},
        "histories": {"dense": trainer.history.to_plain()},
    }
    (folder / "results.json").write_text(json.dumps(written))


def check_dense(dense: Path, out: Path) -> None:
    """Raises ValueError: there is no finished run to go on from, or it was gone on from with other data."""
    if not (dense / "results.json").is_file() or not checkpoint.checkpoints(dense / "dense"):
        raise ValueError(f"upcycling goes on from {dense}, which is no finished run: --only gpt upcycling trains it")
    for folder in (folder_of(dense, top_k, out) for top_k in WAYS.values()):
        if (folder / "results.json").is_file():
            check_same_evaluation(read_run(folder), read_run(dense))


def upcycling(dense_runs: list[Path], out: Path, picture: Path) -> dict:
    """Curves of all ways, means over the dense runs; losses by FLOPs after the dense run's."""
    for dense in dense_runs:
        check_dense(dense, out)
    todo = [(dense, top_k, out) for dense in dense_runs for top_k in WAYS.values()]
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        folders = list(pool.map(go_on, *zip(*todo, strict=True)))
    sides = [Side(label, [read_run(each) for each in folders[i :: len(WAYS)]]) for i, label in enumerate(WAYS)]
    plot_sides(sides, picture, f"{sides[0].runs[0].details['corpus']['name']}; from gpt-tiny after its last step")
    target = sides[0].losses[-1]
    reached = [{axis: side.reaches(target, axis) for axis in AXES} for side in sides]
    return {
        "sides": {
            side.name: as_json(side) | {"reaches_the_dense_models_final_loss_after": where}
            for side, where in zip(sides, reached, strict=True)
        }
    }
