"""Whole models, trained by Megatron-Core's schedules and optimizer: the same numbers as with its own MoE layer."""

import functools

import pytest
import torch
from megatron_hybrid import hybrid
from megatron_layouts import LAYOUTS, RECOMPUTE, assert_same
from megatron_models import batch, gpt, loss_of
from megatron_processes import run
from megatron_training import trained
from megatron_values import fill
from model_cases import dense_spec, experts_spec, fresh, layer_spec, with_options

GATED = {"gated_linear_unit": True, "activation_func": torch.nn.functional.silu}
BALANCED = {"moe_router_load_balancing_type": "aux_loss", "moe_aux_loss_coeff": 0.05, "moe_z_loss_coeff": 0.01}
SGD = {"optimizer": "sgd", "lr": 0.1}  # Adam would make as much of a small difference as of a large one
DEPTHS = {
    "experts": {"spec": experts_spec},
    "layer": {"spec": layer_spec},
    "moefy": {"spec": dense_spec, "convert": fresh},
}


@pytest.fixture(scope="module")
def own(version):
    """Megatron's own MoE layer on one process."""
    return trained(version, 1, overrides=GATED | BALANCED, **SGD)


@pytest.mark.parametrize("depth", DEPTHS)
def test_numbers_are_those_of_megatrons_layer(version, own, depth):
    assert_same(trained(version, 1, overrides=GATED | BALANCED, **DEPTHS[depth], **SGD), own)


@functools.cache
def alone(version, depth, micro_batches=1, make=gpt):
    return trained(version, 1, overrides=GATED, make=make, micro_batches=micro_batches, **DEPTHS[depth])


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "ep2, allgather"])
def test_layouts(version, layout):
    world, sizes, overrides = LAYOUTS[layout]
    assert_same(trained(version, world, overrides=GATED | overrides, spec=layer_spec, **sizes), alone(version, "layer"))


@pytest.mark.parametrize("layout", ["ep2", "ep2, allgather", "tp2 ep2 etp2", "pp2"])
def test_layouts_of_experts_alone(version, layout):
    world, sizes, overrides = LAYOUTS[layout]
    found = trained(version, world, overrides=GATED | overrides, spec=experts_spec, **sizes)
    assert_same(found, alone(version, "experts"))


@pytest.mark.parametrize("layout", ["ep2", "tp2", "pp2"])
def test_layouts_of_a_hybrid_model(version, layout):
    world, sizes, overrides = LAYOUTS[layout]
    found = trained(version, world, make=hybrid, overrides=GATED | overrides, spec=layer_spec, **sizes)
    assert_same(found, alone(version, "layer", make=hybrid))


def test_micro_batches_on_a_pipeline(version):
    found = trained(version, 4, pp=2, ep=2, overrides=GATED, spec=layer_spec, micro_batches=3)
    assert_same(found, alone(version, "layer", 3))


@pytest.mark.parametrize("per_token", [False, True])
def test_balance_losses_over_micro_batches_and_replicas(version, per_token):
    case = {"overrides": GATED | BALANCED | {"calculate_per_token_loss": per_token}, "ep": 2, **SGD}
    micro_batches = 1 if per_token else 2  # the tests' loss does not say how many tokens it is of
    ours, theirs = (trained(version, 2, spec=spec, micro_batches=micro_batches, **case) for spec in (layer_spec, None))
    assert_same(ours, theirs)


@pytest.mark.parametrize(("world", "ep"), [(2, 1), (2, 2), (4, 2)])
def test_gradient_norms_with_biases(version, world, ep):
    """Over a tensor parallel group that holds whole experts: different ones, or copies."""
    biased = {"add_bias_linear": True}
    found = trained(
        version, world, tp=2, ep=ep, etp=1, overrides=biased | {"sequence_parallel": True}, spec=layer_spec, **SGD
    )
    assert_same(found, trained(version, 1, overrides=biased, spec=layer_spec, **SGD))


@pytest.mark.parametrize("what", RECOMPUTE)
def test_recompute(version, own, what):
    found = trained(version, 2, ep=2, overrides=GATED | RECOMPUTE[what], spec=layer_spec)
    assert_same(found, alone(version, "layer"))
    assert_same(trained(version, 1, overrides=GATED | BALANCED | RECOMPUTE[what], spec=layer_spec, **SGD), own)


def test_losses_fall(version):
    losses = trained(version, 2, ep=2, overrides=GATED | BALANCED, spec=layer_spec, steps=5).losses
    assert losses == sorted(losses, reverse=True)


def test_distributed_optimizer(version):
    found = trained(version, 2, ep=2, overrides=GATED, spec=layer_spec, use_distributed_optimizer=True)
    assert_same(found, alone(version, "layer"))


@pytest.mark.parametrize("spec", [layer_spec, experts_spec])
def test_bfloat16(version, spec):
    overrides = GATED | {"bf16": True, "params_dtype": torch.bfloat16}
    found = trained(version, 2, ep=2, overrides=overrides, spec=spec)
    torch.testing.assert_close(found.losses, alone(version, "layer").losses, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("inside", [{"add_bias_linear": True}, GATED | {"moe_shared_expert_intermediate_size": 20}])
def test_a_checkpoint_goes_from_any_expert_parallel_size_to_any_other(version, tmp_path, inside):
    """2 -> 1 -> 2, and of two replicas: every value is bit-equal. Megatron checks that one process writes each piece.

    (Its optimizers need expert parallelism on both sides, or none.)
    """
    for name in "123":
        (tmp_path / name).mkdir()
    case = {"overrides": inside, "spec": layer_spec}
    first = trained(version, 2, ep=2, save=tmp_path / "1", steps=2, **case)
    kept = {"load_optimizer": False, "steps": 0} | case
    second = trained(version, 1, load=tmp_path / "1", save=tmp_path / "2", **kept)
    third = trained(version, 4, ep=2, load=tmp_path / "2", save=tmp_path / "3", **kept)
    fourth = trained(version, 2, load=tmp_path / "3", **kept)
    for then in (second, third, fourth):
        equal(then, first)


def test_a_checkpoint_with_its_optimizer_goes_on_with_twice_the_processes(version, tmp_path):
    (tmp_path / "kept").mkdir()
    case = {"overrides": GATED, "spec": layer_spec}
    straight = trained(version, 2, ep=2, steps=4, **case)
    first = trained(version, 2, ep=2, save=tmp_path / "kept", steps=2, **case)
    then = trained(version, 4, ep=4, load=tmp_path / "kept", steps=2, **case)
    torch.testing.assert_close([*first.losses, *then.losses], straight.losses, rtol=1e-4, atol=0)


def equal(then, first):
    assert set(then.values) == set(first.values)
    for name, value in first.values.items():
        assert torch.equal(then.values[name], value), name


SWAPS = {
    "megatron's to the layer": (None, layer_spec),
    "the layer's to megatron": (layer_spec, None),
    "megatron's to the experts": (None, experts_spec),
}


@pytest.mark.parametrize("swap", SWAPS)
def test_checkpoints_are_megatrons_own(version, tmp_path, swap):
    """Its layer reads what fastmoe's wrote, and the other way round, with the optimizer's state."""
    writes, reads = SWAPS[swap]
    case = {"overrides": GATED | {"moe_shared_expert_intermediate_size": 20}, "ep": 2}
    first = trained(version, 2, spec=writes, save=tmp_path, steps=1, **case)
    equal(trained(version, 2, spec=reads, load=tmp_path, steps=0, **case), first)
    goes_on = [trained(version, 2, spec=spec, load=tmp_path, steps=2, **case) for spec in (writes, reads)]
    torch.testing.assert_close(goes_on[0].losses, goes_on[1].losses, rtol=1e-4, atol=0)


def biased_spec(chosen):
    """Biases of experts where Megatron has none: under tensor parallelism each process has a copy of the second."""
    return with_options(chosen, bias=True)


def test_copies_of_biases_count_once(version, tmp_path):
    expected = trained(version, 1, overrides=GATED, spec=biased_spec, **SGD)
    found = trained(
        version, 2, tp=2, overrides=GATED | {"sequence_parallel": True}, spec=biased_spec, save=tmp_path, **SGD
    )
    assert_same(found, expected)
    equal(trained(version, 1, overrides=GATED, spec=biased_spec, load=tmp_path, load_optimizer=False, steps=0), found)


@pytest.mark.parametrize("swap", SWAPS)
def test_checkpoints_with_biases_are_megatrons_own(version, tmp_path, swap):
    """All but the optimizer, which spares biases of one dimension from weight decay."""
    writes, reads = SWAPS[swap]
    case = {"overrides": {"add_bias_linear": True}, "ep": 2}
    first = trained(version, 2, spec=writes, save=tmp_path, steps=1, **case)
    equal(trained(version, 2, spec=reads, load=tmp_path, load_optimizer=False, steps=0, **case), first)


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("top_k", [1, 2])
@pytest.mark.parametrize("layout", ["dp2", "ep2", "tp2", "tp2 ep2 etp1"])
def test_upcycling_keeps_the_outputs(version, layout, gated, top_k):
    world, sizes, _ = LAYOUTS[layout]
    answers = run(version, world, before_and_after, gated, top_k, sequence_parallel="tp" in sizes, **sizes)
    for before, after, names in answers:
        torch.testing.assert_close(after, before, rtol=1e-5, atol=1e-5)
        assert sum("moe.experts.w1" in name for name in names) == 2


def before_and_after(gated, top_k, sequence_parallel):
    from fastmoe.integrations.megatron import moefy

    inside = GATED if gated else {"add_bias_linear": not sequence_parallel}
    model = fill_all(gpt(inside | {"sequence_parallel": sequence_parallel}, dense_spec))
    before = loss_of(model, batch(0)).detach()
    model = moefy(model, num_experts=4, top_k=top_k)
    return before, loss_of(model, batch(0)).detach(), [name for name, _ in model.named_parameters()]


def fill_all(model):
    fill(model)
    return model
