"""Networks for several tasks on one row of features: Ma et al., KDD 2018 ("Modeling Task Relationships in Multi-task
Learning with Multi-gate Mixture-of-Experts"), to read in a sitting.

Shapes: T rows, D features, K tasks, E experts, W width of what a task's tower takes.

All four are a bottom, `x_TD` to K of `(T, W)`, and K towers, each to one number. They differ in what tasks share:

    mmoe           E experts, each task mixes them by a gate of its own  (section 4.2, equations 6 to 8)
    omoe           E experts, one gate for all tasks                     (section 4.2, equation 5)
    shared_bottom  one layer                                             (section 3.1, equation 1)
    single_task    nothing: a layer for each task

Each has as many parameters as `mmoe`, gates included, as nearly as the width of one layer allows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fastmoe._errors import check_int, unknown_name
from fastmoe.mmoe import MMoE


@dataclass(frozen=True)
class MultiTaskConfig:
    """`d_expert` is W of the experts; a baseline's W follows from it."""

    d_in: int
    num_tasks: int = 2
    num_experts: int = 8
    d_expert: int = 16
    d_tower: int = 8

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            check_int(name, value, 1)


class MultiTask(nn.Module):
    """A bottom, and a tower for each task.

    Args:
        config: sizes.
        sharing: mmoe, omoe, shared_bottom or single_task.

    Example:
        >>> model = MultiTask(MultiTaskConfig(d_in=100), "mmoe")
        >>> model(torch.randn(32, 100)).shape
        torch.Size([32, 2])
    """

    def __init__(self, config: MultiTaskConfig, sharing: str = "mmoe") -> None:
        super().__init__()
        if sharing not in BOTTOMS:
            raise unknown_name("sharing", sharing, BOTTOMS)
        self.config, self.sharing = config, sharing
        self.width = width_of(config, sharing)
        self.bottom = BOTTOMS[sharing](config, self.width)
        self.towers = nn.ModuleList(
            nn.Sequential(nn.Linear(self.width, config.d_tower), nn.ReLU(), nn.Linear(config.d_tower, 1))
            for _ in range(config.num_tasks)
        )

    def forward(self, x_TD: Tensor) -> Tensor:
        """Each task's logit or value: `(T, K)`."""
        return torch.cat([tower(h_TW) for tower, h_TW in zip(self.towers, self.bottom(x_TD), strict=True)], dim=1)


def layer(d_in: int, width: int) -> nn.Module:
    """One expert, or a whole bottom: a single layer, as in the paper."""
    return nn.Sequential(nn.Linear(d_in, width), nn.ReLU())


def mmoe(config: MultiTaskConfig, width: int) -> nn.Module:
    return MMoE(config.d_in, config.num_experts, config.num_tasks, expert=lambda: layer(config.d_in, width))


class OMoE(nn.Module):
    """One gate: an `MMoE` of one task, whose mixture all towers take."""

    def __init__(self, config: MultiTaskConfig, width: int) -> None:
        super().__init__()
        self.num_tasks = config.num_tasks
        self.mixture = MMoE(config.d_in, config.num_experts, 1, expert=lambda: layer(config.d_in, width))

    def forward(self, x_TD: Tensor) -> list[Tensor]:
        return self.mixture(x_TD) * self.num_tasks


class SharedBottom(nn.Module):
    """One layer, whose output all towers take."""

    def __init__(self, config: MultiTaskConfig, width: int) -> None:
        super().__init__()
        self.num_tasks = config.num_tasks
        self.shared = layer(config.d_in, width)

    def forward(self, x_TD: Tensor) -> list[Tensor]:
        return [self.shared(x_TD)] * self.num_tasks


class SingleTask(nn.Module):
    """A layer for each task: with the towers, K networks that share nothing."""

    def __init__(self, config: MultiTaskConfig, width: int) -> None:
        super().__init__()
        self.own = nn.ModuleList(layer(config.d_in, width) for _ in range(config.num_tasks))

    def forward(self, x_TD: Tensor) -> list[Tensor]:
        return [bottom(x_TD) for bottom in self.own]


BOTTOMS: dict[str, Callable[[MultiTaskConfig, int], nn.Module]] = {
    "mmoe": mmoe,
    "omoe": OMoE,
    "shared_bottom": SharedBottom,
    "single_task": SingleTask,
}


def count_parameters(config: MultiTaskConfig, sharing: str, width: int) -> int:
    """Weights and biases of a `MultiTask` whose W is `width`."""
    gates = {"mmoe": config.num_tasks, "omoe": 1}.get(sharing, 0)
    layers = {"shared_bottom": 1, "single_task": config.num_tasks}.get(sharing, config.num_experts)
    tower = (width + 1) * config.d_tower + config.d_tower + 1
    bottom = layers * (config.d_in + 1) * width + gates * config.num_experts * config.d_in
    return bottom + config.num_tasks * tower


def width_of(config: MultiTaskConfig, sharing: str) -> int:
    """The W that brings the parameters nearest to those of `mmoe` with `config.d_expert`: they are linear in it."""
    wanted = count_parameters(config, "mmoe", config.d_expert)
    at_0, at_1 = (count_parameters(config, sharing, width) for width in (0, 1))
    return max(1, round((wanted - at_0) / (at_1 - at_0)))
