"""`FastMoELayer` and `FastMoEExperts`, one layer at a time: the same numbers on any layout, and as Megatron's own."""

import layer_cases
import pytest
import torch
from layer_cases import put_together, run_layer
from megatron_processes import run

GATED = {"gated_linear_unit": True, "activation_func": torch.nn.functional.silu}
LOSSES = {"moe_aux_loss_coeff": 0.1, "moe_z_loss_coeff": 0.01}
# on how many processes; sizes of tensor, expert, expert tensor and context parallelism
LAYOUTS = {
    "2 replicas": (2, 1, 1, 1, 1),
    "ep 2": (2, 1, 2, 1, 1),
    "tp 2": (2, 2, 1, 2, 1),
    "tp 2, ep 2 over it": (2, 2, 2, 1, 1),
    "tp 2, experts whole on each": (2, 2, 1, 1, 1),
    "tp 2, ep 2": (4, 2, 2, 2, 1),
    "tp 2, ep 2 over half": (4, 2, 2, 1, 1),
    "tp 2, ep 4": (4, 2, 4, 1, 1),
    "cp 2": (2, 1, 1, 1, 2),
    "cp 2, ep 2": (2, 1, 2, 1, 2),
    "cp 2, tp 2": (4, 2, 1, 2, 2),
}


def on(version, layout, **options):
    world, tp, ep, etp, cp = LAYOUTS[layout]
    return put_together(run(version, world, run_layer, tp=tp, ep=ep, etp=etp, cp=cp, replicas=2, **options))


def close(got, expected, atol, but=()):
    assert set(got) == set(expected)
    for name in set(expected) - {"metrics", *but}:
        torch.testing.assert_close(got[name], expected[name], rtol=0, atol=atol, msg=lambda m, n=name: f"{n}: {m}")


@pytest.fixture(scope="module")
def alone(version):
    """What one process gives, by case."""
    made = {}

    def of(**options):
        key = repr(options)
        if key not in made:
            made[key] = put_together(run(version, 1, run_layer, replicas=2, **options))
        return made[key]

    return of


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout_changes_no_number(version, alone, layout):
    world, tp, _, etp, cp = LAYOUTS[layout]
    case = {"overrides": GATED | LOSSES | {"add_bias_linear": etp == 1}}  # Megatron forbids both together
    got, expected = on(version, layout, **case), alone(**case)
    close(got, expected, 1e-12)
    for name, value in expected["metrics"].items():  # of micro-batches the sum, of replicas the mean
        torch.testing.assert_close(got["metrics"][name], value / (world // (tp * cp)))


@pytest.mark.parametrize("layout", ["ep 2", "tp 2", "tp 2, ep 2 over it"])
def test_padding_counts_in_no_loss(version, alone, layout):
    case = {"overrides": GATED | LOSSES, "padding": True}
    close(on(version, layout, **case), alone(**case), 1e-12)
    without = alone(overrides=GATED | LOSSES)
    torch.testing.assert_close(alone(**case)["y"], without["y"])
    assert not torch.allclose(alone(**case)["router.weight"], without["router.weight"])


@pytest.mark.parametrize("layout", ["ep 2", "tp 2", "tp 2, ep 2 over it", "cp 2, tp 2"])
@pytest.mark.parametrize(
    "more",
    [
        {"moe_expert_capacity_factor": 0.75},
        {"moe_router_load_balancing_type": "none"},
        {"calculate_per_token_loss": True},
        {"recompute_granularity": "selective", "recompute_modules": ["moe"]},
    ],
    ids=lambda more: next(reversed(more)),
)
def test_options_on_layouts(version, alone, layout, more):
    case = {"overrides": GATED | LOSSES | more}
    close(on(version, layout, **case), alone(**case), 1e-12)


def test_recomputing_changes_no_number(alone):
    recomputed = {"recompute_granularity": "selective", "recompute_modules": ["moe"]}
    got, expected = alone(overrides=GATED | LOSSES | recomputed), alone(overrides=GATED | LOSSES)
    close(got, expected, 0)
    assert str(got["metrics"]) == str(expected["metrics"])


def test_a_global_balance_loss_is_of_all_replicas(version):
    one_batch = {"overrides": GATED | {"moe_aux_loss_coeff": 0.1, "moe_router_load_balancing_type": "global_aux_loss"}}
    answers = [on(version, layout, **one_batch) for layout in ("2 replicas", "ep 2")]
    close(answers[0], answers[1], 1e-12)
    values = answers[0]["metrics"]["global_load_balancing_loss"]
    local = on(version, "ep 2", overrides=GATED | LOSSES)["metrics"]["load_balancing_loss"]
    assert values.shape == local.shape
    assert not torch.allclose(values, local)


@pytest.mark.parametrize("kind", ["experts", "megatron"])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("layout", ["2 replicas", "ep 2", "tp 2, ep 2 over it"])
def test_numbers_are_megatrons(version, layout, bias, kind):
    """The same weights in Megatron's own layer, around fastmoe's experts and around its own."""
    if (kind, bias, layout) == ("megatron", True, "2 replicas"):
        pytest.skip("Megatron's experts with a bias and without expert parallelism work in place on a view, an error")
    case = {"overrides": GATED | LOSSES | {"add_bias_linear": bias, "params_dtype": torch.float32}}
    ours, theirs = (on(version, layout, kind=which, **case) for which in ("layer", kind))
    summed_over_other_experts = ["b2"] if kind == "megatron" and layout == "tp 2, ep 2 over it" else []
    close(theirs, ours, 1e-5, but=summed_over_other_experts)
    if version == "newest":  # the older one takes no mean of the z-loss
        assert set(ours["metrics"]) == set(theirs["metrics"])
        for name, value in theirs["metrics"].items():
            torch.testing.assert_close(ours["metrics"][name], value, rtol=1e-5, atol=0)


ROUTINGS = {
    "plain": {},
    "pre-softmax": {"moe_router_pre_softmax": True},
    "scaled": {"moe_router_pre_softmax": True, "moe_router_topk_scaling_factor": 2.5},
    "one": {"moe_router_topk": 1, "moe_router_pre_softmax": True},
    "sigmoid": {"moe_router_score_function": "sigmoid"},
    "groups": {  # Megatron's balance loss does not know them
        "moe_router_num_groups": 2,
        "moe_router_group_topk": 1,
        "moe_router_pre_softmax": True,
        "moe_aux_loss_coeff": 0.0,
    },
    "sequences": {"moe_router_score_function": "sigmoid", "moe_router_load_balancing_type": "seq_aux_loss"},
    "sigmoid with a bias": {
        "moe_router_score_function": "sigmoid",
        "moe_router_enable_expert_bias": True,
        "moe_router_load_balancing_type": "seq_aux_loss",
    },
    "drop by weight": {"moe_expert_capacity_factor": 0.75, "moe_token_drop_policy": "probs"},
    "ungated gelu": {"gated_linear_unit": False, "activation_func": torch.nn.functional.gelu},
    "ungated relu": {"gated_linear_unit": False, "activation_func": torch.nn.functional.relu},
    "shared expert": {"moe_shared_expert_intermediate_size": 20},
}


@pytest.mark.parametrize("routing", ROUTINGS)
def test_arguments_mean_what_they_mean_to_megatron(version, routing):
    overrides = GATED | {"moe_aux_loss_coeff": 0.1, "params_dtype": torch.float32} | ROUTINGS[routing]
    ours, theirs = (
        put_together(run(version, 1, run_layer, kind=kind, overrides=overrides), gated=overrides["gated_linear_unit"])
        for kind in ("layer", "megatron")
    )
    close(ours, theirs, 1e-5)


def test_an_inference_pass_is_the_training_pass_without_losses(version, alone):
    case = {"overrides": GATED | LOSSES}
    assert torch.equal(alone(**case, train=False)["y"], alone(**case)["y"])
    assert not alone(**case, train=False)["metrics"].get("z_loss", torch.zeros(1)).any()


def test_the_layer_says_what_it_cannot_do(version):
    messages = run(version, 1, layer_cases.messages)[0]
    expected = {
        "other number": "num_experts=8, but the configuration says num_moe_experts=4",
        "double": "moe_router_dtype",
        "sinkhorn": "moe_z_loss_coeff=0.1 does not go with router 'sinkhorn'",
        "by chance": "moe_expert_capacity_factor=1.0 does not go with router 'random'",
        "sequences": "moe_router_load_balancing_type='seq_aux_loss' does not go with router 'expert_choice'",
        "loss free": "set moe_router_enable_expert_bias=True",
        "recomputed": "recompute_modules: moe_act is of Megatron's own layer",
        "unsupported": "fastmoe has no moe_input_jitter_eps: leave it at None, got 0.1",
        "two routers": "moe_aux_loss_coeff=0.1 does not go with router 'switch'",
        "unknown kind": "moe_router_load_balancing_type must be one of",
        "activation": "activation_func must be gelu, silu or relu",
        "submodules": "FastMoELayer has no submodules",
    }
    for case, words in expected.items():
        assert words in messages[case], case
    several = run(version, 2, layer_cases.messages_of_two, tp=2, etp=1)[0]
    assert "needs sequence_parallel=True" in several["no sequence parallelism"]
