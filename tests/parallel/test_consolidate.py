"""`fastmoe consolidate`: one file of a checkpoint, with the unsharded model's names."""

import json
import pickle

import pytest
import torch
from checkpoint_cases import assert_same, build, state_of, trained
from torch import nn
from torch.distributed.checkpoint import FileSystemReader

from fastmoe import cli, save
from fastmoe.parallel import checkpoint_planner

safetensors = pytest.importorskip("safetensors.torch")


@pytest.fixture
def single(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint_planner, "CHUNK_BYTES", 1)  # experts lie apart, as those of many processes
    save(*trained(), tmp_path / "single")
    return tmp_path / "single"


def test_the_model(single, tmp_path, capsys):
    out = tmp_path / "model.safetensors"
    out.write_text("replaced")
    assert cli.main(["consolidate", str(single), str(out)]) == 0
    model, _ = trained()
    assert_same(safetensors.load_file(out), dict(model.state_dict()))
    assert capsys.readouterr().out == f"written: {out} ({len(model.state_dict())} tensors)\n"
    assert {path.name for path in tmp_path.iterdir()} == {"single", "model.safetensors"}
    build().load_state_dict(safetensors.load_file(out))


def test_the_optimizer(single, tmp_path):
    out = tmp_path / "all.safetensors"
    assert cli.main(["consolidate", str(single), str(out), "--optimizer"]) == 0
    expected = {name.removeprefix("model."): value for name, value in state_of(*trained()).items()}
    assert_same(safetensors.load_file(out), expected)
    with safetensors.safe_open(out, "pt") as file:
        about = json.loads(file.metadata()["optimizer"])
    assert [group["options"]["weight_decay"] for group in about["groups"]] == [0.1, 0.01]
    assert "first.weight" in about["groups"][0]["params"]


def drop_expert(path):
    metadata = FileSystemReader(path).read_metadata()
    del metadata.state_dict_metadata["model.stacked.experts.w1"].chunks[2]
    (path / ".metadata").write_bytes(pickle.dumps(metadata))


@pytest.mark.parametrize(
    ("damage", "out", "options", "words"),
    [
        (lambda path: path.rename(path.with_name("gone")), "a", [], "there is no checkpoint"),
        (lambda path: (path / ".metadata").unlink(), "a", [], "is not a checkpoint of fastmoe.save"),
        (lambda path: (path / "__0_0.distcp").unlink(), "a", [], "has no __0_0.distcp"),
        (drop_expert, "a", [], "has only parts: stacked.experts.w1"),
        (lambda path: save(trained()[0], None, path, overwrite=True), "a", ["--optimizer"], "without an optimizer"),
        (lambda path: None, ".", [], "is a folder, expected the name of a file"),
        (lambda path: None, "no/a", [], "there is no folder"),
    ],
)
def test_what_cannot_be_done(single, tmp_path, capsys, damage, out, options, words):
    damage(single)
    before = set(tmp_path.iterdir())
    assert cli.main(["consolidate", str(single), str(tmp_path / out), *options]) == 2
    assert words in capsys.readouterr().err
    assert set(tmp_path.iterdir()) == before


def test_names_that_model_and_optimizer_share(tmp_path, capsys):
    buffer = nn.Module()
    buffer.register_buffer("exp_avg", torch.zeros(2))
    model = nn.ModuleDict({"w": nn.Linear(2, 2), "optimizer": nn.ModuleDict({"w": nn.ModuleDict({"weight": buffer})})})
    optimizer = torch.optim.AdamW(model["w"].parameters())
    model["w"](torch.ones(2)).sum().backward()
    optimizer.step()
    save(model, optimizer, tmp_path / "one")
    assert cli.main(["consolidate", str(tmp_path / "one"), str(tmp_path / "a"), "--optimizer"]) == 2
    assert "model and optimizer both have tensors named optimizer.w.weight.exp_avg" in capsys.readouterr().err
