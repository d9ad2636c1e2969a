"""Model, optimizer and schedule."""

import pytest
import torch
from tiny_run import change

import fastmoe
from fastmoe.train.build import autocast_dtype, build_model, build_optimizer, learning_rate
from fastmoe.train.config import OptimConfig


@pytest.fixture
def with_biases(tiny):
    return change(tiny, model={"bias": True})


def test_twins_have_equal_flops_and_start_from_equal_weights(with_biases):
    dense, moe = build_model(with_biases, "dense"), build_model(with_biases, "moe")
    for layer in fastmoe.moe_layers(moe).values():
        assert layer.top_k * layer.experts.w1.shape[1] == with_biases.model.dense_hidden
    shared = dense.state_dict().keys() & moe.state_dict().keys()
    assert {name for name in dense.state_dict() if ".mlp." not in name} <= shared
    for name in shared:
        assert torch.equal(dense.state_dict()[name], moe.state_dict()[name]), name


@pytest.mark.parametrize("arch", ["gpt", "transformer_xl"])
def test_init_scale_is_on_the_matrices_of_blocks_alone(tiny, arch):
    plain, scaled = (build_model(change(tiny, model={"arch": arch, "init_scale": s}), "moe") for s in (1.0, 5.0))
    larger = set()
    for (name, before), after in zip(plain.named_parameters(), scaled.parameters(), strict=True):
        factor = 5 if before.ndim >= 2 and "embedding" not in name and not name.endswith((".b1", ".b2")) else 1
        torch.testing.assert_close(after, before * factor, rtol=0, atol=0, msg=name)
        larger |= {name.rpartition(".")[2] for _ in range(factor == 5)}
    assert {"weight", "w1", "w2"} <= larger


def test_experts_start_as_wide_as_dense_blocks(tiny):
    tiny = change(tiny, model={"init_scale": 5.0, "d_model": 64})
    dense, moe = (build_model(tiny, kind).blocks[0].mlp for kind in ("dense", "moe"))
    assert moe.experts.w1.std().item() == pytest.approx(dense.c_fc.weight.std().item(), rel=0.05)
    assert moe.experts.w2.std().item() == pytest.approx(dense.c_proj.weight.std().item(), rel=0.05)


def test_active_parameters_differ_by_the_routers_alone(tiny):
    dense, moe = (fastmoe.summary(build_model(tiny, kind)) for kind in ("dense", "moe"))
    routers = tiny.model.n_layer * tiny.moe.num_experts * tiny.model.d_model
    assert moe.active_params - dense.active_params == routers
    assert moe.total_params > dense.total_params == dense.active_params


def test_every_other_block_can_become_an_moe(tiny):
    assert len(fastmoe.moe_layers(build_model(change(tiny, moe={"every": 2}), "moe"))) == 1


@pytest.mark.parametrize("kind", ["dense", "moe"])
def test_weight_decay_leaves_norms_and_biases_alone(with_biases, kind):
    model = build_model(with_biases, kind)
    decayed, free = (group["params"] for group in build_optimizer(model, with_biases.optim).param_groups)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    assert len(decayed) + len(free) == len(names)
    not_decayed = {names[id(parameter)].rpartition(".")[2] for parameter in free}
    assert not_decayed == ({"weight", "bias"} | ({"b1", "b2"} if kind == "moe" else set()))
    assert all("norm" in names[id(parameter)] for parameter in free if names[id(parameter)].endswith("weight"))
    assert all(parameter.ndim >= 2 for parameter in decayed)


def test_learning_rate_warms_up_and_ends_at_its_minimum():
    optim = OptimConfig(steps=101, lr=1.0, min_lr=0.1, warmup_steps=10)
    assert [learning_rate(step, optim) for step in (0, 4, 9)] == pytest.approx([0.1, 0.5, 1.0])
    assert learning_rate(10, optim) == pytest.approx(1.0)
    assert learning_rate(55, optim) == pytest.approx(0.55)
    assert learning_rate(100, optim) == pytest.approx(0.1)
    assert learning_rate(5000, optim) == pytest.approx(0.1)
    assert learning_rate(0, OptimConfig(steps=1, lr=1.0, warmup_steps=0)) == 1.0


def test_precision():
    cpu = torch.device("cpu")
    assert autocast_dtype("auto", cpu) is None
    assert autocast_dtype("float32", cpu) is None
    assert autocast_dtype("bfloat16", cpu) is torch.bfloat16
