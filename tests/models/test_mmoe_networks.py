"""The networks of Ma et al., KDD 2018: equal sizes, and what each shares."""

import pytest
import torch
import torch.nn.functional as F

from fastmoe.models.mmoe import BOTTOMS, MultiTask, MultiTaskConfig, count_parameters, width_of

CONFIGS = [MultiTaskConfig(100), MultiTaskConfig(483, d_expert=8), MultiTaskConfig(37, 3, 5, 4, 6)]


def size(model):
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("sharing", BOTTOMS)
def test_all_have_equal_parameter_counts(config, sharing):
    model = MultiTask(config, sharing)
    assert size(model) == count_parameters(config, sharing, model.width)
    one_unit = count_parameters(config, sharing, 2) - count_parameters(config, sharing, 1)
    assert abs(size(model) - size(MultiTask(config, "mmoe"))) <= one_unit / 2


def test_an_mmoe_has_the_width_that_is_asked_for():
    assert width_of(CONFIGS[0], "mmoe") == 16


@pytest.mark.parametrize("sharing", BOTTOMS)
def test_shapes(sharing):
    model = MultiTask(MultiTaskConfig(7, num_tasks=3), sharing)
    assert model(torch.randn(5, 7)).shape == (5, 3)


def relu_layer(x_TD, weights, name):
    return F.linear(x_TD, weights[f"{name}.weight"], weights[f"{name}.bias"]).relu()


def mixture(x_TD, weights, level, task):
    """Equation 6: what a gate makes of 3 experts."""
    shared = f"{level}.shared.modules_list"
    experts_TEW = torch.stack([relu_layer(x_TD, weights, f"{shared}.{e}.0") for e in range(3)], dim=1)
    gate_TE = (x_TD @ weights[f"{level}.gates.{task}.weight"].T).softmax(1)
    return (gate_TE.unsqueeze(2) * experts_TEW).sum(1)


@pytest.mark.parametrize(
    ("sharing", "bottom"),
    [
        ("mmoe", lambda x_TD, weights, task: mixture(x_TD, weights, "bottom.levels.0", task)),
        ("omoe", lambda x_TD, weights, task: mixture(x_TD, weights, "bottom.mixture.levels.0", 0)),
        ("shared_bottom", lambda x_TD, weights, task: relu_layer(x_TD, weights, "bottom.shared.0")),
        ("single_task", lambda x_TD, weights, task: relu_layer(x_TD, weights, f"bottom.own.{task}.0")),
    ],
)
def test_networks_are_the_paper_s_equations(sharing, bottom):
    model = MultiTask(MultiTaskConfig(7, num_tasks=2, num_experts=3), sharing)
    x_TD, weights = torch.randn(5, 7), model.state_dict()
    for k in range(2):
        hidden_TW = relu_layer(bottom(x_TD, weights, k), weights, f"towers.{k}.0")
        want_T1 = F.linear(hidden_TW, weights[f"towers.{k}.2.weight"], weights[f"towers.{k}.2.bias"])
        torch.testing.assert_close(model(x_TD)[:, k], want_T1[:, 0])


@pytest.mark.parametrize("sharing", ["mmoe", "omoe", "shared_bottom"])
def test_a_task_s_gradient_reaches_what_is_shared(sharing):
    model = MultiTask(MultiTaskConfig(7), sharing)
    model(torch.randn(5, 7))[:, 0].sum().backward()
    assert any(p.grad is not None and p.grad.any() for p in model.bottom.parameters())
    assert all(p.grad is None or not p.grad.any() for p in model.towers[1].parameters())


def test_single_tasks_share_nothing():
    model = MultiTask(MultiTaskConfig(7), "single_task")
    model(torch.randn(5, 7))[:, 0].sum().backward()
    assert all(p.grad is not None for p in model.bottom.own[0].parameters())
    assert all(p.grad is None or not p.grad.any() for p in model.bottom.own[1].parameters())


def test_errors():
    with pytest.raises(ValueError, match=r"unknown sharing 'mmoee'. Did you mean 'mmoe'"):
        MultiTask(MultiTaskConfig(7), "mmoee")
    with pytest.raises(ValueError, match="d_tower must be a whole number >= 1, got 0"):
        MultiTaskConfig(7, d_tower=0)
