"""Megatron-Core's own MoELayer through all that ours goes through: what differs there is not of the tests' making."""

import functools

import pytest
import torch
from megatron_hybrid import hybrid
from megatron_layouts import LAYOUTS, RECOMPUTE, SPLIT, assert_same
from megatron_models import gpt
from megatron_training import trained


@functools.cache
def on_one_process(version, make, micro_batches=1):
    return trained(version, 1, make=make, micro_batches=micro_batches)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(version, layout):
    world, sizes, overrides = LAYOUTS[layout]
    assert_same(trained(version, world, overrides=overrides, **sizes), on_one_process(version, gpt))


@pytest.mark.parametrize("layout", ["ep2", "tp2", "pp2"])
def test_layouts_of_a_hybrid_model(version, layout):
    world, sizes, overrides = LAYOUTS[layout]
    assert_same(trained(version, world, make=hybrid, overrides=overrides, **sizes), on_one_process(version, hybrid))


@pytest.mark.parametrize(("world", "sizes"), [(2, {"pp": 2}), (4, {"pp": 2, "ep": 2})], ids=["pp2", "pp2 ep2"])
def test_micro_batches(version, world, sizes):
    assert_same(trained(version, world, micro_batches=3, **sizes), on_one_process(version, gpt, 3))


@pytest.mark.parametrize("what", RECOMPUTE)
def test_recompute(version, what):
    assert_same(trained(version, 2, ep=2, overrides=RECOMPUTE[what]), on_one_process(version, gpt))


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_losses_fall(version, optimizer):
    losses = trained(version, 1, steps=5, optimizer=optimizer).losses
    assert losses == sorted(losses, reverse=True)


def test_distributed_optimizer(version):
    found = trained(version, 2, ep=2, use_distributed_optimizer=True)
    assert_same(found, on_one_process(version, gpt))


def test_bfloat16(version):
    overrides = {"bf16": True, "params_dtype": torch.bfloat16}
    found, expected = trained(version, 2, ep=2, overrides=overrides), on_one_process(version, gpt)
    torch.testing.assert_close(found.losses, expected.losses, rtol=1e-2, atol=1e-2)


def test_checkpoint_of_model_and_optimizer(version, tmp_path):
    """In another layout, it goes on as if nothing had been."""
    expected = trained(version, 1)
    trained(version, 2, ep=2, steps=2, save=tmp_path)
    for world, sizes, overrides in ((4, {"ep": 4}, {}), (4, {"ep": 2, "tp": 2, "etp": 1}, SPLIT)):
        found = trained(version, world, **sizes, overrides=overrides, steps=1, load=tmp_path)
        torch.testing.assert_close(found.losses, expected.losses[-1:], rtol=1e-5, atol=1e-5)
        for name, value in expected.values.items():
            torch.testing.assert_close(found.values[name], value, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("layout", ["dp2", "tp2", "pp2"])
def test_checkpoint_of_the_model(version, layout, tmp_path):
    expected = trained(version, 2, ep=2, steps=1, save=tmp_path).values
    world, sizes, overrides = LAYOUTS[layout]
    found = trained(version, world, **sizes, overrides=overrides, steps=0, load=tmp_path, load_optimizer=False).values
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())
