"""Each recipe trains; full-size ones are built on the meta device, and trained at a fraction of their size."""

import dataclasses
import sys
import types

import pytest
import torch
from tiny_run import change, losses, make_trainer

import fastmoe
from fastmoe.models import NAMED, GPTConfig
from fastmoe.train.build import build_model
from fastmoe.train.command import main, parse
from fastmoe.train.config import TrainConfig
from fastmoe.train.loop import train
from fastmoe.train.models import model_config, train_flops_per_token
from fastmoe.train.options import merge, to_plain
from fastmoe.train.recipes import RECIPES, TWINS, recipe

FULL_SIZE = {"txl-enwik8-base", "txl-enwik8-base-moe64", "gpt-small", "gpt-small-moe96", "lstm-dense", "lstm-moe512"}
SMALL = {"model": {"d_model": 32, "d_hidden": 64, "block_size": 16}, "moe": {"num_experts": 8}}
SHORT = {"optim": {"steps": 20, "batch_size": 4, "warmup_steps": 2, "lr": 1e-2}, "data": {"eval_sequences": 8}}


def fraction(name, text_file, out):
    """The recipe with its schedule cut to 20 steps; full-size ones also with narrow layers and few experts."""
    layers = {} if recipe(name).model.arch == "lstm" else {"n_layer": 1, "n_head": 2}
    small = SMALL | {"model": SMALL["model"] | layers} if name in FULL_SIZE else {}
    run = {"out": out, "device": "cpu", "tensorboard": False}
    config = change(recipe(name), **small, **{key: dict(value) for key, value in SHORT.items()}, run=run)
    return change(config, data={"path": text_file})


@pytest.mark.parametrize("name", RECIPES)
def test_twenty_steps(name, text_file, tmp_path):
    config = fraction(name, text_file, tmp_path)
    trainer = make_trainer(config, config.mode)
    assert train([trainer], [], lambda: False)
    assert len(trainer.history.losses) == 20
    assert trainer.history.valid_losses[-1] < trainer.history.valid_losses[0] - 1
    assert bool(fastmoe.moe_layers(trainer.model)) == (config.mode == "moe")


@pytest.mark.parametrize("twins", TWINS, ids=[twins.moe for twins in TWINS])
def test_twins_cost_the_same_but_for_the_router(twins):
    flops = {}
    for name in (twins.dense, twins.moe):
        layers = {} if recipe(name).model.arch == "lstm" else {"n_layer": 2}
        config = change(recipe(name), model=layers)
        with torch.device("meta"):
            model = build_model(config, config.mode)
        routers = [layer.router for layer in fastmoe.moe_layers(model).values()]
        in_routers = sum(parameter.numel() for router in routers for parameter in router.parameters())
        flops[name] = train_flops_per_token(model, config.model) - 6 * in_routers
    assert flops[twins.moe] == pytest.approx(flops[twins.dense], rel=0.01)


@pytest.mark.parametrize("name", RECIPES)
def test_models_are_those_of_the_table_of_models(name):
    """But for the vocabulary, which is of bytes here."""
    known, ours = NAMED[name], recipe(name)
    assert model_config(ours.model) == dataclasses.replace(
        known, num_experts=0, vocab_size=256, d_hidden=ours.model.dense_hidden
    )
    assert ours.model.dense_hidden == known.d_hidden or (known.d_hidden is None and isinstance(known, GPTConfig))
    assert known.num_experts == (ours.moe.num_experts if ours.mode == "moe" else 0)
    assert (known.top_k, known.expert_hidden, known.router) == (ours.moe.top_k, None, ours.moe.router)


# steps, batch_size, lr, min_lr, warmup_steps, weight_decay, beta2, grad_clip; eval_sequences, segment
SCHEDULES = {
    "txl-enwik8-base": (400_000, 22, 2.5e-4, 0.0, 0, 0.0, 0.999, 0.25, 0, 512),
    "gpt-small": (100_000, 64, 6e-4, 6e-5, 2000, 0.1, 0.95, 1.0, 512, 1024),
    "lstm-dense": (50_000, 256, 1e-3, 1e-5, 1000, 0.0, 0.95, 1.0, 0, 128),
    "gpt-tiny": (1200, 32, 4e-3, 4e-4, 100, 0.1, 0.95, 1.0, 512, 64),
    "txl-tiny": (1000, 32, 4e-3, 4e-4, 100, 0.1, 0.95, 1.0, 512, 64),
    "lstm-tiny": (1200, 32, 4e-3, 4e-4, 100, 0.1, 0.95, 1.0, 512, 64),
}


@pytest.mark.parametrize("twins", TWINS, ids=[twins.dense for twins in TWINS])
def test_twins_are_trained_alike_as_published(twins):
    dense, moe = recipe(twins.dense), recipe(twins.moe)
    for section in ("model", "data", "optim"):
        assert getattr(dense, section) == getattr(moe, section)
    o = dense.optim
    schedule = (o.steps, o.batch_size, o.lr, o.min_lr, o.warmup_steps, o.weight_decay, o.beta2, o.grad_clip)
    assert (*schedule, dense.data.eval_sequences, dense.model.block_size) == SCHEDULES[twins.dense]
    assert dense.run.checkpoint_every <= dense.run.eval_every < o.steps / 5


def test_flops_of_a_token():
    """6 for each active parameter, 12 for each layer, width and position seen."""
    attention = {"gpt-tiny": 12 * 2 * 64 * 32.5, "txl-tiny": 12 * 2 * 64 * 96.5, "lstm-tiny": 0}
    parameters = {"gpt-tiny": 115_008, "txl-tiny": 124_672, "lstm-tiny": 116_288}
    for name in attention:
        model = build_model(recipe(name), "dense")
        assert train_flops_per_token(model, recipe(name).model) == 6 * parameters[name] + attention[name]


def test_published_sizes():
    sizes = []
    for name in ("txl-enwik8-base", "txl-enwik8-base-moe64"):
        with torch.device("meta"):
            model = build_model(recipe(name), recipe(name).mode)
        sizes.append(sum(parameter.numel() for parameter in model.parameters()))
    assert sizes[0] == pytest.approx(41e6, rel=0.02)
    assert 18 < sizes[1] / sizes[0] < 22


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_is_a_config_that_reads_back(name):
    assert merge(TrainConfig(), to_plain(recipe(name))) == recipe(name)


def test_flags_go_over_a_recipe(tmp_path):
    file = tmp_path / "run.toml"
    file.write_text('recipe = "txl-tiny"\n[optim]\nsteps = 30\n')
    config = parse(["--config", str(file), "--recipe", "txl-tiny-moe", "--seed", "3", "--valid", "v.txt"])
    assert (config.mode, config.model.arch, config.run.seed) == ("moe", "transformer_xl", 3)
    assert (config.optim.steps, config.data.valid.name, config.run.out.name) == (30, "v.txt", "txl-tiny-moe")
    assert config.moe == recipe("txl-tiny-moe").moe
    assert parse(["--recipe", "lstm-tiny"]) == recipe("lstm-tiny")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--recipe", "txl-tinny"], "unknown recipe 'txl-tinny'. Did you mean 'txl-tiny'"),
        (["--recipe", "txl-tiny", "--preset", "demo"], "expected a preset or a recipe; got both"),
        (["--recipe", "lstm-tiny", "--n-head", "2"], "arch 'lstm' has no n_head: expected it to be left at 6; got 2"),
        (["--recipe", "gpt-tiny", "--model-options", "memory_length=3"], "unknown model option of gpt 'memory_length'"),
        (["--recipe", "txl-tiny", "--model-options", "d_model=3"], "unknown model option of transformer_xl 'd_model'"),
        (["--recipe", "gpt-tiny", "--model-options", "num_experts=4"], "unknown model option of gpt 'num_experts'"),
        (["--recipe", "txl-tiny", "--model-options", "memory_length=a"], "memory_length must be int; got 'a'"),
        (["--recipe", "txl-tiny", "--model-options", "memory_length=3.5"], "memory_length must be int; got 3.5"),
        (["--recipe", "txl-tiny", "--model-options", "pre_norm=maybe"], "pre_norm must be bool; got 'maybe'"),
        (["--recipe", "txl-tiny", "--model-options", "cutoffs=3"], "cutoffs must be a list; got 3"),
    ],
)
def test_what_is_no_recipe(arguments, message, capsys):
    assert main(arguments) == 2
    assert message in capsys.readouterr().err


def test_recipes_on_tables_are_handed_over(monkeypatch):
    got = []
    module = types.ModuleType("fastmoe.tabular.command")
    module.main = lambda arguments: got.append(arguments) or 5
    monkeypatch.setitem(sys.modules, "fastmoe.tabular.command", module)
    assert main(["--data", "census.gz", "--recipe", "mmoe-census", "--seeds", "2"]) == 5
    assert main(["--recipe", "mmoe-synthetic"]) == 5
    assert got == [["mmoe-census", "--data", "census.gz", "--seeds", "2"], ["mmoe-synthetic"]]


@pytest.mark.parametrize("name", ["gpt-tiny-moe", "lstm-tiny"])
def test_a_recipe_from_the_command_line_with_two_files(name, text_file, tmp_path, capsys):
    valid = tmp_path / "valid.txt"
    valid.write_bytes(text_file.read_bytes()[:3000])
    arguments = ["--recipe", name, "--data", str(text_file), "--valid", str(valid), "--out", str(tmp_path / "run")]
    assert main([*arguments, "--steps", "2", "--sample-bytes", "5", "--no-tensorboard", "--device", "cpu"]) == 0
    assert len(losses(tmp_path / "run", recipe(name).mode)) == 2
    assert "/ 3,000 / 0 bytes" in capsys.readouterr().out.replace("\n", " ").replace("  ", " ")
