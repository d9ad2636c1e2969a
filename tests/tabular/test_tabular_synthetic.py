"""The synthetic tasks: their formula, and what is trained and evaluated on which rows."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from fastmoe.models.mmoe import BOTTOMS, MultiTask
from fastmoe.tabular import synthetic
from fastmoe.tabular.synthetic import Problem, SyntheticOptions, fit_synthetic, held_out_loss, make_problem

SMALL = SyntheticOptions(d_in=10, steps=25, eval_every=10, eval_rows=256)


@pytest.mark.parametrize("correlation", [-0.3, 0.5, 1.0])
def test_a_problem_is_the_paper_s_formula(correlation):
    problem = make_problem(correlation, 0, SyntheticOptions(d_in=20, scale=2.0))
    w1_D, w2_D = problem.w_KD
    assert w1_D.norm().item() == pytest.approx(2)
    assert w2_D.norm().item() == pytest.approx(2)
    assert (w1_D @ w2_D).item() / 4 == pytest.approx(correlation, abs=1e-6)
    x_TD, y_TK = problem.draw(4000, torch.Generator().manual_seed(0))
    for k in range(2):
        z_T = x_TD @ problem.w_KD[k]
        waves = [torch.sin(alpha * z_T + beta) for alpha, beta in zip(problem.alpha_M, problem.beta_M, strict=True)]
        noise_T = y_TK[:, k] - z_T - sum(waves)
        assert noise_T.var().item() == pytest.approx(0.01, rel=0.1)


def test_the_seed_sets_the_direction_and_the_correlation_the_angle():
    first, wider, other = (make_problem(c, seed, SMALL) for c, seed in ((0.5, 0), (0.9, 0), (0.5, 1)))
    assert torch.equal(first.w_KD[0], wider.w_KD[0])
    assert abs(torch.cosine_similarity(first.w_KD[0], other.w_KD[0], dim=0)) < 0.9
    assert first.alpha_M.tolist() == other.alpha_M.tolist() == list(SMALL.alphas)
    assert first.beta_M.tolist() == other.beta_M.tolist() == list(SMALL.betas)


def test_labels_correlate_more_as_tasks_do():
    measured = []
    for correlation in (0.0, 0.5, 0.9, 1.0):
        _, y_TK = make_problem(correlation, 0, SyntheticOptions()).draw(20000, torch.Generator().manual_seed(0))
        measured.append(torch.corrcoef(y_TK.T)[0, 1].item())
    assert measured == sorted(measured)
    assert abs(measured[0]) < 0.05
    assert measured[-1] > 0.95


@pytest.mark.parametrize("sharing", BOTTOMS)
def test_training_lowers_the_loss_and_repeats(sharing):
    options = SyntheticOptions(d_in=10, steps=60, eval_every=30, eval_rows=256)
    problem = make_problem(0.9, 0, options)
    first, again = (fit_synthetic(problem, sharing, 0, 1e-2, options) for _ in range(2))
    assert first == again
    assert first.losses[-1] < 0.5 * first.losses[0]


def test_the_last_step_is_evaluated():
    assert fit_synthetic(make_problem(0.5, 0, SMALL), "mmoe", 0, 1e-3, SMALL).steps == [0, 10, 20, 25]


def test_the_held_out_loss_is_of_both_tasks():
    x_TD, y_TK = torch.zeros(4, 1), torch.tensor([[1.0, 3.0]]).expand(4, 2)
    assert held_out_loss(lambda x_TD: x_TD.expand(4, 2), (x_TD, y_TK)) == pytest.approx((1 + 9) / 2)


class Recorded:
    """What `fit_synthetic` makes and draws on the way."""

    def __init__(self, monkeypatch):
        self.weights, self.held_out, self.drawn = [], [], []
        draw = Problem.draw
        monkeypatch.setattr(synthetic, "MultiTask", self.make)
        monkeypatch.setattr(synthetic, "held_out_loss", self.evaluate)
        monkeypatch.setattr(Problem, "draw", lambda *args: self.drawn.append(draw(*args)) or self.drawn[-1])

    def make(self, config, sharing):
        model = MultiTask(config, sharing)
        self.weights.append(model.towers[0][0].weight.detach().clone())
        return model

    def evaluate(self, model, rows):
        self.held_out.append(rows)
        return held_out_loss(model, rows)


def test_held_out_rows_are_never_trained_on(monkeypatch):
    recorded = Recorded(monkeypatch)
    fit_synthetic(make_problem(0.5, 0, SMALL), "mmoe", 0, 1e-3, SMALL)
    held_out = recorded.held_out[0]
    assert all(rows is held_out for rows in recorded.held_out)
    assert len(held_out[0]) == SMALL.eval_rows
    batches = [rows for rows in recorded.drawn if rows is not held_out]
    assert [len(x_TD) for x_TD, _ in batches] == [SMALL.batch_size] * SMALL.steps
    values = torch.cat([x_TD.flatten() for x_TD, _ in batches])
    assert torch.isin(held_out[0], values).float().mean() < 0.01
    assert values.unique().numel() > 0.99 * values.numel()


def test_the_seed_sets_weights_and_rows(monkeypatch):
    recorded = Recorded(monkeypatch)
    problem, fewer = make_problem(0.5, 0, SMALL), replace(SMALL, eval_rows=16)
    for sharing, seed, options in (
        ("mmoe", 0, SMALL), ("mmoe", 1, SMALL), ("shared_bottom", 0, SMALL), ("mmoe", 0, fewer)
    ):  # fmt: skip
        fit_synthetic(problem, sharing, seed, 1e-3, options)
    assert not torch.equal(recorded.weights[0], recorded.weights[1])
    per_fit = 1 + SMALL.steps
    for place in range(per_fit):  # held-out rows, then each step's
        first, other_seed, other_model, fewer_held_out = (x_TD for x_TD, _ in recorded.drawn[place::per_fit])
        assert torch.equal(first, other_model)
        assert not torch.equal(first, other_seed)
        assert place == 0 or torch.equal(first, fewer_held_out)


def test_a_step_follows_the_loss_of_both_tasks(monkeypatch):
    recorded = Recorded(monkeypatch)
    made = []
    monkeypatch.setattr(
        torch.optim, "Adam", lambda weights, lr, fused: made.extend(weights) or torch.optim.SGD(made, lr)
    )
    options = SyntheticOptions(d_in=10, steps=1, eval_rows=8)
    fit_synthetic(make_problem(0.5, 0, options), "mmoe", 0, 0.0, options)
    gradients = [weight.grad for weight in made]
    x_TD, y_TK = next(rows for rows in recorded.drawn if len(rows[0]) == options.batch_size)
    with torch.no_grad():
        model = MultiTask(options.model, "mmoe")
        for mine, theirs in zip(model.parameters(), made, strict=True):
            mine.copy_(theirs)
    F.mse_loss(model(x_TD), y_TK).backward()
    torch.testing.assert_close(gradients, [weight.grad for weight in model.parameters()])


@pytest.mark.parametrize(
    ("lr", "message"),
    [
        (1e30, r"^mmoe diverged by step 10 at lr 1e\+30 with seed 3: give lower lrs$"),
        (float("nan"), "lr must be a finite number >= 0, got nan"),
    ],
)
def test_learning_rates_that_cannot_be_used(lr, message):
    with pytest.raises(ValueError, match=message):
        fit_synthetic(make_problem(0.5, 0, SMALL), "mmoe", 3, lr, SMALL)


def test_what_makes_no_problem():
    with pytest.raises(ValueError, match=r"correlation must be between -1 and 1, got 1\.5"):
        make_problem(1.5, 0, SMALL)
    with pytest.raises(ValueError, match="d_in must be a whole number >= 2, got 1"):
        SyntheticOptions(d_in=1)
