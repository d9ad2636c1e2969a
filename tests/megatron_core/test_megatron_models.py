"""Whole models, trained by Megatron-Core's schedules and optimizer: the same numbers as with its own MoE layer."""

import pytest
import torch
from megatron_models import batch, gpt, loss_of
from megatron_processes import run
from megatron_training import trained
from megatron_values import fill
from model_cases import dense_spec, experts_spec, fresh, layer_spec

GATED = {"gated_linear_unit": True, "activation_func": torch.nn.functional.silu}
BALANCED = {"moe_router_load_balancing_type": "aux_loss", "moe_aux_loss_coeff": 0.05, "moe_z_loss_coeff": 0.01}
DEPTHS = {
    "experts": {"spec": experts_spec},
    "layer": {"spec": layer_spec},
    "moefy": {"spec": dense_spec, "convert": fresh},
}
LAYOUTS = {
    "ep 2": (2, {"ep": 2}),
    "2 replicas": (2, {}),
    "tp 2, ep 2 over it": (2, {"tp": 2, "ep": 2, "etp": 1}),
    "tp 2": (2, {"tp": 2, "etp": 2}),
    "pp 2": (2, {"pp": 2}),
}


def close(got, expected, rtol=1e-4):
    torch.testing.assert_close(got.losses, expected.losses, rtol=rtol, atol=0)
    torch.testing.assert_close(
        got.norms, expected.norms, rtol=10 * rtol, atol=0
    )  # Adam makes much of small differences
    assert set(got.values) == set(expected.values)
    for name, value in expected.gradients.items():
        torch.testing.assert_close(got.gradients[name], value, rtol=1e-3, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


@pytest.fixture(scope="module")
def own(version):
    """Megatron's own MoE layer on one process."""
    return trained(version, 1, overrides=GATED | BALANCED)


@pytest.mark.parametrize("depth", DEPTHS)
def test_numbers_are_those_of_megatrons_layer(version, own, depth):
    got = trained(version, 1, overrides=GATED | BALANCED, **DEPTHS[depth])
    close(got, own)
    assert got.losses[-1] < got.losses[0]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("depth", ["layer", "experts"])
def test_layout_changes_no_number(version, depth, layout):
    world, sizes = LAYOUTS[layout]
    if depth == "experts" and sizes.get("etp") == 2:
        pytest.skip("Megatron's dispatcher gathers uneven rows then, which gloo cannot")
    parallel = {"sequence_parallel": "tp" in sizes}
    micro_batches = 2 if "pp" in sizes else 1
    case = {"micro_batches": micro_batches, **DEPTHS[depth]}
    expected = trained(version, 1, overrides=GATED, **case)
    close(trained(version, world, overrides=GATED | parallel, **sizes, **case), expected)


RECOMPUTED = {
    "full": {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
    "moe": {"recompute_granularity": "selective", "recompute_modules": ["moe"]},
    "mlp": {"recompute_granularity": "selective", "recompute_modules": ["mlp"]},
}


@pytest.mark.parametrize("recomputed", RECOMPUTED)
def test_recomputing_changes_no_number(version, own, recomputed):
    overrides = GATED | BALANCED | RECOMPUTED[recomputed]
    close(trained(version, 2, ep=2, overrides=overrides | UNBALANCED, spec=layer_spec), unbalanced(version))
    close(trained(version, 1, overrides=overrides, spec=layer_spec), own)


UNBALANCED = {"moe_router_load_balancing_type": "none", "moe_aux_loss_coeff": 0.0, "moe_z_loss_coeff": None}


def unbalanced(version):
    return trained(version, 1, overrides=GATED, spec=layer_spec)


@pytest.mark.parametrize("inside", [{"add_bias_linear": True}, GATED | {"moe_shared_expert_intermediate_size": 20}])
def test_a_checkpoint_goes_from_any_expert_parallel_size_to_any_other(version, tmp_path, inside):
    """2 -> 1 -> 2: every value is bit-equal. (Megatron's optimizers need expert parallelism on both sides, or none.)"""
    for name in "12":
        (tmp_path / name).mkdir()
    case = {"overrides": inside, "spec": layer_spec}
    first = trained(version, 2, ep=2, save=tmp_path / "1", steps=2, **case)
    kept = {"load_optimizer": False, "steps": 0} | case
    second = trained(version, 1, load=tmp_path / "1", save=tmp_path / "2", **kept)
    third = trained(version, 2, ep=2, load=tmp_path / "2", **kept)
    for then in (second, third):
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


@pytest.mark.parametrize("swap", SWAPS)
def test_checkpoints_with_biases_are_megatrons_own(version, tmp_path, swap):
    """All but the optimizer, which spares biases of one dimension from weight decay."""
    writes, reads = SWAPS[swap]
    case = {"overrides": {"add_bias_linear": True}, "ep": 2}
    first = trained(version, 2, spec=writes, save=tmp_path, steps=1, **case)
    equal(trained(version, 2, spec=reads, load=tmp_path, load_optimizer=False, steps=0, **case), first)


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("top_k", [1, 2])
@pytest.mark.parametrize("layout", ["one", "ep 2", "tp 2, ep 2 over it", "tp 2"])
def test_upcycling_keeps_the_outputs(version, layout, gated, top_k):
    world, sizes = (1, {}) if layout == "one" else LAYOUTS[layout]
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
