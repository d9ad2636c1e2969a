"""Any router in a training run."""

import pytest
import torch
from tiny_run import as_flags, change, make_trainer

import fastmoe
from fastmoe import cli
from fastmoe.routers import ROUTERS
from fastmoe.train import checkpoint
from fastmoe.train.build import build_model
from fastmoe.train.command import parse
from fastmoe.train.loop import train

NAMES = sorted(name for name, cls in ROUTERS.items() if cls.__module__.startswith("fastmoe."))
ONE_EXPERT = {"switch", "base"}


def with_router(config, name, options=None):
    top_k = 1 if name in ONE_EXPERT else 2
    return change(config, mode="moe", moe={"router": name, "top_k": top_k, "router_options": options or {}})


@pytest.mark.parametrize("name", NAMES)
def test_a_run_with_every_router(tiny, name, capsys):
    config = with_router(change(tiny, run={"monitor": True}), name)
    assert cli.main(["train", *as_flags(config)]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert ("sees the future" in printed) == (name in ("soft", "expert_choice", "gshard", "swipe"))


@pytest.mark.parametrize("name", ["topk", "loss_free", "switch", "gshard"])
def test_a_resumed_run_has_exactly_the_losses_of_an_uninterrupted_one(tiny, tmp_path, name):
    options = {"capacity_factor": 0.9}
    whole = make_trainer(with_router(tiny, name, options))
    assert train([whole], [], lambda: False)
    stopped = with_router(change(tiny, run={"out": tmp_path / "stopped"}), name, options)
    first = make_trainer(stopped)
    assert not train([first], [], lambda: first.step == 7)
    second = make_trainer(stopped)
    checkpoint.newest(second.folder, second.restore)
    assert train([second], [], lambda: False)
    assert second.history.losses == whole.history.losses
    for key, tensor in whole.model.state_dict().items():
        assert torch.equal(tensor, second.model.state_dict()[key]), key


def test_options_come_from_toml_and_from_flags(tmp_path):
    path = tmp_path / "run.toml"
    path.write_text('[moe]\nrouter = "switch"\ntop_k = 1\n[moe.router_options]\njitter = 0.5\ndrop_by = "weight"\n')
    config = parse(["--config", str(path)])
    assert (config.moe.router, config.moe.router_options) == ("switch", {"jitter": 0.5, "drop_by": "weight"})
    texts = ["capacity_factor=inf", "normalize=false", "num_groups=4", "score_function=sigmoid", "scale=2.5", "a=None"]
    config = parse(["--config", str(path), "--router", "topk", "--router-options", *texts])
    assert config.moe.router_options == {
        "capacity_factor": float("inf"),
        "normalize": False,
        "num_groups": 4,
        "score_function": "sigmoid",
        "scale": 2.5,
        "a": None,
    }
    assert parse(["--router-options", "x=True", "y=a=b"]).moe.router_options == {"x": True, "y": "a=b"}


def test_options_reach_the_layers(tiny):
    config = with_router(tiny, "switch", {"jitter": 0.5})
    config = change(config, moe={"aux_loss_weight": 0.25})
    for layer in fastmoe.moe_layers(build_model(config, "moe")).values():
        assert (layer.router.jitter, layer.router.aux_loss_weight, layer.router.z_loss_weight) == (0.5, 0.25, 0.0)


def test_a_routers_own_start_is_kept(tiny):
    for layer in fastmoe.moe_layers(build_model(with_router(tiny, "noisy_topk"), "moe")).values():
        assert layer.router.proj.weight.abs().max() == layer.router.noise.weight.abs().max() == 0
    for layer in fastmoe.moe_layers(build_model(with_router(tiny, "soft"), "moe")).values():
        assert layer.router.scale.item() == 1
    for layer in fastmoe.moe_layers(build_model(with_router(tiny, "topk"), "moe")).values():
        assert layer.router.proj.weight.std().item() == pytest.approx(0.02, rel=0.5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--router", "swich"], "unknown router 'swich'. Did you mean 'switch'"),
        (["--router", "switch"], "router 'switch' sends each token to one expert: give top_k=1"),
        (
            ["--aux-loss-weight", "0", "--router-options", "aux_loss_weight=1"],
            "leave aux_loss_weight out of router_options",
        ),
        (["--router", "hash", "--router-options", "vocab_size=10"], "leave vocab_size out of router_options"),
        (["--router-options", "jiter=1"], "unknown option of router 'topk' 'jiter'"),
        (["--router", "hash", "--aux-loss-weight", "0.1"], "unknown option of router 'hash' 'aux_loss_weight'"),
    ],
)
def test_what_cannot_be_run_is_said_in_one_line(tiny, capsys, arguments, message):
    flags = as_flags(change(tiny, mode="moe"))
    assert cli.main(["train", *flags, *arguments]) == 2
    assert message in capsys.readouterr().err


def test_values_that_cannot_be(tmp_path, capfd):
    with pytest.raises(SystemExit) as stopped:
        parse(["--router-options", "jitter"])
    assert stopped.value.code == 2
    assert "KEY=VALUE" in capfd.readouterr().err
    with pytest.raises(SystemExit):
        parse(["--aux-loss-weight", "-1"])
    assert "aux_loss_weight must be at least 0; got -1" in capfd.readouterr().err
    path = tmp_path / "run.toml"
    path.write_text("[moe]\nrouter_options = 3\n")
    with pytest.raises(ValueError, match="router_options must be a table; got 3"):
        parse(["--config", str(path)])


def test_a_checkpoint_with_other_router_options_is_refused(tiny):
    trainer = make_trainer(with_router(change(tiny, optim={"steps": 4}), "switch"))
    train([trainer], [], lambda: False)
    another = make_trainer(with_router(tiny, "switch", {"jitter": 0.3}))
    with pytest.raises(ValueError, match=r"was trained with moe = .* now"):
        checkpoint.newest(another.folder, another.restore)
