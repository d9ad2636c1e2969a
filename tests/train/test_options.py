"""Presets, TOML files and flags."""

from dataclasses import fields, is_dataclass
from pathlib import Path

import pytest

from fastmoe.train.command import parse
from fastmoe.train.config import ModelConfig, MoEConfig, OptimConfig, RunConfig, TrainConfig
from fastmoe.train.options import PRESETS, merge, to_plain


@pytest.fixture
def toml(tmp_path):
    def write(text):
        path = tmp_path / "run.toml"
        path.write_text(text)
        return str(path)

    return write


def test_without_arguments_it_is_the_small_preset():
    assert parse([]) == PRESETS["small"]


def test_a_toml_file_goes_over_the_preset_and_flags_over_both(toml):
    path = toml('preset = "demo"\n[model]\nn_layer = 2\n[optim]\nlr = 1\nsteps = 7\n[data]\npath = "some.txt"\n')
    config = parse(["--config", path, "--steps", "9"])
    assert (config.model.n_layer, config.optim.lr, config.optim.steps) == (2, 1.0, 9)
    assert config.data.path == Path("some.txt")
    assert config.mode == "compare"
    assert config.optim.batch_size == PRESETS["demo"].optim.batch_size


def test_options_of_the_model_go_over_one_by_one(toml):
    path = toml('recipe = "txl-tiny"\n[model.model_options]\nmemory_length = 32\n')
    assert parse(["--config", path]).model.model_options == {"memory_length": 32, "pre_norm": True}
    config = parse(["--config", path, "--model-options", "pre_norm=false", "clamp_distance=9"])
    assert config.model.model_options == {"memory_length": 32, "pre_norm": False, "clamp_distance": 9}


def test_options_of_another_model_are_left_behind(toml):
    shape = ["--arch", "lstm", "--n-layer", "6", "--n-head", "6"]
    assert parse(["--recipe", "txl-tiny", *shape]).model.model_options == {}
    assert parse(["--recipe", "txl-tiny", *shape, "--model-options", "layers_after=2"]).model.model_options == {
        "layers_after": 2
    }
    path = toml('recipe = "txl-tiny"\n[model]\narch = "gpt"\nmodel_options = {norm = "rms"}\n')
    assert parse(["--config", path]).model.model_options == {"norm": "rms"}


def test_a_preset_flag_goes_over_that_of_the_file(toml):
    assert parse(["--config", toml('preset = "demo"'), "--preset", "small"]) == PRESETS["small"]


def test_flags_of_all_sections():
    arguments = "--mode dense --d-model 96 --num-experts 32 --data f.gz --lr 0.5 --out x --resume --no-tensorboard"
    config = parse(arguments.split())
    assert (config.mode, config.model.d_model, config.moe.num_experts) == ("dense", 96, 32)
    assert (config.data.path, config.optim.lr, config.run.out) == (Path("f.gz"), 0.5, Path("x"))
    assert config.run.resume
    assert not config.run.tensorboard


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[model]\nd_modl = 3", r"unknown key in .*\[model\] 'd_modl'. Did you mean 'd_model'\?"),
        ("[optm]\nlr = 3", r"'optm'. Did you mean 'optim'\?"),
        ("model = 3", r"model is a section; write its keys under \[model\]"),
        ("[model]\nd_model = 'wide'", r"\[model\]: d_model must be int; got 'wide'"),
        ("[model]\nd_model = 3.5", "d_model must be int; got 3.5"),
        ("[run]\nresume = 1", "resume must be bool; got 1"),
        ('mode = "danse"', "'danse'. Did you mean 'dense'"),
        ("[model", "is not valid TOML"),
        ("[optim]\nsteps = 0", "steps must be at least 1; got 0"),
        ("[data]\neval_sequences = -1", "eval_sequences must be at least 0; got -1"),
        ("[model]\ninit_scale = 0", "init_scale must be a finite number above 0; got 0"),
        ("[model]\ninit_scale = nan", "init_scale must be a finite number above 0; got nan"),
        ('preset = ["a"]', r"preset must be a name; got \['a'\]"),
        ('recipe = ["a"]', r"recipe must be a name; got \['a'\]"),
        ('recipe = "mmoe-census"', "'mmoe-census' has options of its own and no file: fastmoe train --recipe"),
        ('preset = "dem"', "unknown preset 'dem'. Did you mean 'demo'"),
    ],
)
def test_what_a_toml_file_must_not_say(toml, text, message):
    with pytest.raises(ValueError, match=message):
        parse(["--config", toml(text)])


def test_a_missing_config_file_is_named():
    with pytest.raises(ValueError, match=r"no such config file: nowhere.toml"):
        parse(["--config", "nowhere.toml"])


@pytest.mark.parametrize(("flag", "near"), [("--d-modle", "--d-model"), ("--num-expert", "--num-experts")])
def test_an_unknown_flag_ends_with_the_nearest(capfd, flag, near):
    with pytest.raises(SystemExit) as stopped:
        parse([flag, "3"])
    assert stopped.value.code == 2
    assert near in capfd.readouterr().err


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: MoEConfig(num_experts=2, top_k=3), "top_k must be at most num_experts=2; got 3"),
        (lambda: MoEConfig(num_experts=0), "num_experts must be at least 1; got 0"),
        (lambda: ModelConfig(dropout=1.0), r"dropout must be in \[0, 1\); got 1.0"),
        (lambda: OptimConfig(lr=-1.0), "lr must be at least 0; got -1.0"),
        (lambda: RunConfig(eval_every=0), "eval_every must be at least 1; got 0"),
        (lambda: TrainConfig(moe=MoEConfig(top_k=5)), "does not divide by top_k=5; give expert_hidden"),
    ],
)
def test_values_out_of_range_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("name", PRESETS)
def test_a_saved_config_reads_back(name):
    assert merge(TrainConfig(), to_plain(PRESETS[name])) == PRESETS[name]


def test_names_of_options_are_unique_since_flags_have_no_section():
    sections = [field.default_factory for field in fields(TrainConfig) if is_dataclass(field.default_factory)]
    names = [field.name for section in sections for field in fields(section)]
    assert len(sections) == 6
    assert len(names) == len(set(names))
