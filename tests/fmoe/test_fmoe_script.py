"""A script written for FastMoE trains on two processes."""

import importlib.util
from pathlib import Path

import torch
from processes import needs_gloo, run

SCRIPT = Path(__file__).parents[2] / "examples" / "fastmoe_script.py"


def trained(steps):
    spec = importlib.util.spec_from_file_location("fastmoe_script", SCRIPT)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    losses, model = script.train(steps, torch.device("cpu"))
    marks = {name: getattr(p, "dp_comm", "dp") for name, p in model.named_parameters()}
    return losses, model.state_dict(), marks


@needs_gloo
def test_the_loss_falls_and_shared_parameters_stay_equal():
    (losses, one, marks), (_, other, _) = run(2, trained, 30)
    assert losses[0] > 3.2
    assert losses[-1] < 2.5
    assert set(marks.values()) == {"dp", "gate", "none"}
    for name, mark in marks.items():
        assert one[name].equal(other[name]) is (mark != "none"), name
