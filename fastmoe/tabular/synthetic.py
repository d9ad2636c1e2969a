"""Two regression tasks whose correlation one chooses: the synthetic data of Ma et al., KDD 2018, section 3.2."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from fastmoe._errors import check_int, check_number
from fastmoe._seeds import mix
from fastmoe.models.mmoe import MultiTask, MultiTaskConfig

NOISE = 0.1
"""Standard deviation of the labels' noise: its variance is 0.01, the least loss that a model can reach."""


@dataclass(frozen=True)
class SyntheticOptions:
    """`scale` is the paper's c; `alphas` and `betas` are given there too, the same for all seeds, but it does not say
    which: these are ours."""

    d_in: int = 100
    scale: float = 1.0
    alphas: tuple[float, ...] = (1.0, 2.0, 3.0)
    betas: tuple[float, ...] = (0.0, 0.5, 1.0)
    num_experts: int = 8
    d_expert: int = 16
    d_tower: int = 8
    steps: int = 3000
    batch_size: int = 128
    eval_every: int = 250
    eval_rows: int = 4096

    def __post_init__(self) -> None:
        check_int("d_in", self.d_in, 2)
        for name in ("steps", "batch_size", "eval_every", "eval_rows"):
            check_int(name, getattr(self, name), 1)
        check_number("scale", self.scale)
        if len(self.alphas) != len(self.betas):
            raise ValueError(f"alphas and betas must be as many, got {len(self.alphas)} and {len(self.betas)}")

    @property
    def model(self) -> MultiTaskConfig:
        return MultiTaskConfig(self.d_in, 2, self.num_experts, self.d_expert, self.d_tower)


@dataclass(frozen=True)
class Problem:
    """`y_k = w_k.x + sum over i of sin(alpha_i w_k.x + beta_i) + noise`, with x standard normal.

    The two rows of `w_KD` have length `scale`, and the cosine of the angle between them is the correlation.
    """

    w_KD: Tensor
    alpha_M: Tensor
    beta_M: Tensor

    def draw(self, rows: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """`x_TD` and `y_TK`."""
        x_TD = torch.randn(rows, self.w_KD.shape[1], generator=generator)
        z_TK = x_TD @ self.w_KD.T
        y_TK = z_TK + (z_TK.unsqueeze(2) * self.alpha_M + self.beta_M).sin().sum(2)
        return x_TD, y_TK + NOISE * torch.randn(y_TK.shape, generator=generator)


def make_problem(correlation: float, seed: int, options: SyntheticOptions) -> Problem:
    """The problem of a seed, which sets the direction of the weights; the correlation sets the angle between them.

    Raises:
        ValueError: a correlation outside -1 and 1.
    """
    if not -1 <= correlation <= 1:
        raise ValueError(f"correlation must be between -1 and 1, got {correlation!r}")
    generator = torch.Generator().manual_seed(mix(seed, "problem"))
    basis_D2, _ = torch.linalg.qr(torch.randn(options.d_in, 2, generator=generator, dtype=torch.float64))
    u1_D, u2_D = basis_D2.unbind(1)
    w2_D = correlation * u1_D + math.sqrt(1 - correlation**2) * u2_D
    w_KD = (options.scale * torch.stack([u1_D, w2_D])).float()
    return Problem(w_KD, torch.tensor(options.alphas), torch.tensor(options.betas))


@dataclass(frozen=True)
class Curve:
    """Held-out mean squared error, mean of the two tasks, after each number of steps."""

    steps: list[int]
    losses: list[float]
    parameters: int


def fit_synthetic(problem: Problem, sharing: str, seed: int, lr: float, options: SyntheticOptions) -> Curve:
    """Train a `MultiTask` by Adam on rows that are drawn anew for every step, the same for every `sharing`.

    Raises:
        ValueError: a learning rate that is no number, or at which training diverges.
    """
    check_number("lr", lr)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(mix(seed, "weights"))
        model = MultiTask(options.model, sharing)
    optimizer = torch.optim.Adam(model.parameters(), lr=lr, fused=True)
    train = torch.Generator().manual_seed(mix(seed, "train"))
    held_out = problem.draw(options.eval_rows, torch.Generator().manual_seed(mix(seed, "held out")))
    steps, losses = [0], [held_out_loss(model, held_out)]
    for step in range(1, options.steps + 1):
        x_TD, y_TK = problem.draw(options.batch_size, train)
        optimizer.zero_grad()
        F.mse_loss(model(x_TD), y_TK).backward()
        optimizer.step()
        if step % options.eval_every == 0 or step == options.steps:
            steps.append(step)
            losses.append(held_out_loss(model, held_out))
            if not math.isfinite(losses[-1]):
                raise ValueError(f"{sharing} diverged by step {step} at lr {lr:g} with seed {seed}: give lower lrs")
    return Curve(steps, losses, sum(parameter.numel() for parameter in model.parameters()))


@torch.no_grad()
def held_out_loss(model: MultiTask, rows: tuple[Tensor, Tensor]) -> float:
    x_TD, y_TK = rows
    return F.mse_loss(model(x_TD), y_TK).item()
