"""The table of backends, and the choice among them."""

import logging

import pytest
import torch

import fastmoe
from fastmoe import kernels
from fastmoe.kernels import registry


class Fake:
    """A backend that cannot run here, or cannot serve a kernel."""

    name = "fake"
    optional = False

    def __init__(self, unavailable=None, refusal=None):
        self.unavailable, self.refusal = unavailable, refusal

    def available(self):
        return self.unavailable

    def refuses(self, op, x, *weights):
        return self.refusal


@pytest.fixture
def fake(monkeypatch):
    def register(**reasons):
        monkeypatch.setitem(registry.BACKENDS, "fake", Fake(**reasons))
        monkeypatch.setattr(registry, "PREFERENCE", {"cpu": ["fake", "torch"]})
        monkeypatch.setattr(registry, "_logged", set())

    return register


IDS = torch.tensor([1, 0, 1])


def test_what_is_available(fake):
    machine = {"triton": "?", "native": "?"}
    assert fastmoe.backends() | machine == machine | {"torch": "available", "reference": "available"}
    fake(unavailable="no such chip")
    assert fastmoe.backends()["fake"] == "no such chip"


@pytest.mark.parametrize("reasons", [{"unavailable": "no such chip"}, {"refusal": "odd sizes"}])
def test_auto_goes_on_and_says_why_once(fake, reasons, caplog):
    fake(**reasons)
    with caplog.at_level(logging.WARNING, logger="fastmoe"):
        for _ in range(3):
            assert kernels.plan(IDS, 2).order_N.tolist() == [1, 0, 2]
    (record,) = caplog.records
    assert record.getMessage() == f"backend 'fake' cannot serve plan ({next(iter(reasons.values()))}); falling back"


@pytest.mark.parametrize("reasons", [{"unavailable": "no such chip"}, {"refusal": "odd sizes"}])
def test_a_forced_backend_serves_or_raises(fake, reasons):
    fake(**reasons)
    with pytest.raises(ValueError, match=f"backend 'fake' cannot serve plan: {next(iter(reasons.values()))}"):
        kernels.plan(IDS, 2, backend="fake")


def test_none_can_serve(fake, monkeypatch):
    fake(unavailable="no such chip")
    monkeypatch.setattr(registry, "PREFERENCE", {"cpu": ["fake"]})
    with pytest.raises(ValueError, match=r"no backend can serve plan for torch\.int64 on cpu: tried fake"):
        kernels.plan(IDS, 2)


def test_auto_never_takes_the_reference(monkeypatch):
    monkeypatch.setattr(registry.BACKENDS["reference"], "plan", None, raising=False)
    assert kernels.plan(IDS, 2).order_N.tolist() == [1, 0, 2]


@pytest.mark.parametrize(("name", "near"), [("torhc", "torch"), ("referense", "reference"), ("Auto", "auto")])
def test_unknown_names(name, near):
    with pytest.raises(ValueError, match=f"unknown backend '{name}'. Did you mean '{near}'"):
        fastmoe.MoE(4, 2, backend=name)
    with pytest.raises(ValueError, match=f"Did you mean '{near}'"):
        kernels.plan(IDS, 2, backend=name)
