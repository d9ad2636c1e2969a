"""`moefy` of built models, specs of layers and blocks, experts and routers of one's own, the table of arguments."""

import moefy_cases
import pytest
import torch
from megatron_processes import run
from megatron_training import trained
from moefy_cases import own_spec_of

LAYERS = [f"decoder.layers.{i}.mlp.moe" for i in range(4)]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, LAYERS),
        ({"every": 2}, LAYERS[1::2]),
        ({"target": "decoder.layers.[02].mlp"}, LAYERS[::2]),
        ({"init": "random", "top_k": 1, "d_hidden": 20}, LAYERS),
    ],
    ids=["all", "every", "target", "random"],
)
def test_layers_are_replaced(version, options, expected):
    (found,) = run(version, 1, moefy_cases.converted, **options)
    assert found["layers"] == found["again"] == expected
    assert found["stats"] == len(expected)
    assert found["num_moe_experts"] == 4
    assert found["aux_loss_weight"] == 0.01
    assert found["summary"] == found["own"]
    assert found["grads"]


def test_what_cannot_be_is_said_and_nothing_changes(version):
    (found,) = run(version, 1, moefy_cases.errors)
    expected = {
        "wrapped": "before it is wrapped; got DistributedDataParallel",
        "nothing": "found no MLP of Megatron-Core that target='*.attention' names in GPTModel",
        "init": "unknown init 'copy'",
        "width": "which has d_hidden=48; got d_hidden=7",
        "expert": "give expert= with init='random'",
        "option": "unknown option 'experts'. Did you mean 'expert'?",
        "weights": "routing weights must sum to 1",
        "native": "to_native= is for models of transformers",
        "soft": "use it with init='random'",
    }
    for case, words in expected.items():
        message, unchanged = found[case]
        assert message.startswith("ValueError"), case
        assert words in message, case
        assert unchanged, case


def test_a_hybrid_model_keeps_its_outputs(version):
    before, after, layers = run(version, 1, moefy_cases.hybrid_outputs)[0]
    torch.testing.assert_close(after, before, rtol=1e-5, atol=1e-5)
    assert layers == ["decoder.layers.1.mlp.moe"]


def test_a_norm_inside_the_mlp_moves_in_front_of_it(version):
    inside, after, names = run(version, 1, moefy_cases.norm_inside)[0]
    torch.testing.assert_close(after, inside, rtol=1e-5, atol=1e-5)
    assert "decoder.layers.0.pre_mlp_layernorm.weight" in names
    assert not any("layer_norm_weight" in name for name in names)


def test_moe_layer_freq_says_which_layers(version):
    assert run(version, 1, moefy_cases.every_second) == [[LAYERS[0], LAYERS[2]]]


def test_experts_and_routers_of_ones_own(version, tmp_path):
    """On two processes as on one, and in checkpoints between them."""
    case = {"spec": own_spec_of, "steps": 2}
    expected = trained(version, 1, **case)
    found = trained(version, 2, ep=2, save=tmp_path, **case)
    torch.testing.assert_close(found.losses, expected.losses, rtol=1e-5, atol=0)
    torch.testing.assert_close(found.norms, expected.norms, rtol=1e-4, atol=0)
    assert any(".experts.modules.3.inner.weight" in name for name in found.values)
    then = trained(version, 1, load=tmp_path, load_optimizer=False, **case | {"steps": 0})
    assert set(then.values) == set(found.values)
    assert all(torch.equal(then.values[name], value) for name, value in found.values.items())


def test_megatron_moves_the_expert_bias(version):
    for biases, loads, left in run(version, 2, moefy_cases.expert_bias_after_a_step, ep=2):
        for bias, load in zip(biases, loads, strict=True):
            assert len(set(load)) > 1
            assert all(abs(abs(b) - 1e-3) < 1e-9 or b == 0 for b in bias)
            assert any(bias)
        assert not any(count for of_layer in left for count in of_layer)


def test_every_argument_of_megatron_about_moe_is_in_one_table(version):
    ((about_moe, tables),) = run(version, 1, moefy_cases.all_arguments)
    for name in about_moe:
        assert sum(name in table for table in tables) == 1, name


def test_values_of_megatrons_layer(version):
    theirs, ours, message = run(version, 1, moefy_cases.same_values_of_others)[0]
    torch.testing.assert_close(ours, theirs)
    assert "only one of them has decoder.layers" in message


def test_every_layer_has_the_balance_loss(version):
    (weights,) = run(version, 1, moefy_cases.weights_of_balance_losses)
    assert weights == [[0.01] * 4] * 3


@pytest.mark.parametrize(
    ("overrides", "options"),
    [
        ({"moe_router_topk_scaling_factor": 2.5}, {}),
        ({"moe_expert_capacity_factor": 0.5}, {}),
        ({"moe_router_load_balancing_type": "sinkhorn"}, {}),
        ({}, {"router_options": {"scale": 2.0}}),
        ({}, {}),
    ],
)
def test_changed_outputs_are_told(version, overrides, options):
    (messages,) = run(version, 1, moefy_cases.warned, overrides, options)
    assert [message.startswith("moefy: outputs change") for message in messages] == [True] * bool(overrides or options)


def test_a_norm_that_has_no_place_changes_nothing(version):
    message, unchanged = run(version, 1, moefy_cases.norm_without_a_place)[0]
    assert "has no pre_mlp_layernorm to take the norm" in message
    assert unchanged
