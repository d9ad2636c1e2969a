"""The networks of Ma et al., KDD 2018: equal sizes, and what each shares."""

import pytest
import torch

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


def test_mmoe_is_equations_5_and_6():
    model = MultiTask(MultiTaskConfig(7, num_tasks=2, num_experts=3), "mmoe")
    x_TD = torch.randn(5, 7)
    level = model.bottom.levels[0]
    experts_TEW = torch.stack([expert(x_TD) for expert in level.shared.modules_list], dim=1)
    for k in range(2):
        gate_TE = (x_TD @ level.gates[k].weight.T).softmax(1)
        mixed_TW = (gate_TE.unsqueeze(2) * experts_TEW).sum(1)
        torch.testing.assert_close(model(x_TD)[:, k], model.towers[k](mixed_TW)[:, 0])


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
