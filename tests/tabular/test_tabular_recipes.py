"""The recipes: a few steps of each, the same numbers for the same seed, learning, and what they write."""

import json

import pytest
import torch
from census_rows import rows, write

pytest.importorskip("polars")

from fastmoe.models.mmoe import BOTTOMS, MultiTaskConfig
from fastmoe.tabular.command import main
from fastmoe.tabular.features import load_census
from fastmoe.tabular.fit import FitOptions, batches_of_epochs, fit, task_losses
from fastmoe.tabular.recipes import run_census
from fastmoe.tabular.synthetic import SyntheticOptions, fit_synthetic, make_problem

SHORT = FitOptions(batch_size=64, max_steps=20)


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    return write(tmp_path_factory.mktemp("census") / "census-income.test", rows(1000))


@pytest.fixture(scope="module")
def census(file):
    return load_census([file])


@pytest.mark.parametrize("sharing", BOTTOMS)
def test_twenty_steps_of_each_are_the_same_for_the_same_seed(census, sharing):
    config = MultiTaskConfig(len(census.features), d_expert=4)
    before = torch.get_rng_state()
    first, again, other = (fit(census, config, sharing, seed, 1e-3, SHORT) for seed in (0, 0, 1))
    assert (first.test_auc, first.valid_auc) == (again.test_auc, again.valid_auc)
    assert first.test_auc != other.test_auc
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("sharing", BOTTOMS)
def test_learns(census, sharing):
    config = MultiTaskConfig(len(census.features), d_expert=4)
    done = fit(census, config, sharing, 0, 1e-2, FitOptions(batch_size=64, max_epochs=8))
    income, single = done.test_auc
    assert income > 0.6
    assert single > 0.99


def test_the_first_steps_follow_the_sum_of_cross_entropies(census):
    logits_TK, y_TK = torch.randn(5, 2), torch.randint(2, (5, 2)).float()
    p_TK = logits_TK.sigmoid()
    want_K = -(y_TK * p_TK.log() + (1 - y_TK) * (1 - p_TK).log()).mean(0)
    torch.testing.assert_close(task_losses(logits_TK, y_TK), want_K)


def test_stops_when_validation_does_not_rise(census):
    config = MultiTaskConfig(len(census.features), d_expert=4)
    done = fit(census, config, "mmoe", 0, 0.0, FitOptions(max_epochs=50, patience=3))
    assert (done.epochs, done.best_epochs) == (4, [1, 1])


def test_every_row_is_in_every_epoch_once():
    first, second = batches_of_epochs(600, 0, FitOptions(max_epochs=2))
    assert [len(batch) for batch in first] == [512, 88]
    assert not torch.equal(torch.cat(first), torch.cat(second))
    for batches in (first, second):
        assert torch.cat(batches).sort().values.tolist() == list(range(600))


def test_max_steps_is_kept():
    options = FitOptions(batch_size=100, max_steps=8)
    assert [len(batches) for batches in batches_of_epochs(600, 0, options)] == [6, 2]


def test_utilization_is_a_share_of_experts(census):
    done = fit(census, MultiTaskConfig(len(census.features), d_expert=4), "mmoe", 0, 1e-3, SHORT)
    assert torch.tensor(done.utilization).sum(1).tolist() == pytest.approx([1, 1], abs=1e-4)


def test_census_command(file, tmp_path, capsys):
    small = ["--seeds", "2", "--d-expert", "4", "--max-steps", "20", "--batch-size", "64"]
    assert main(["mmoe-census", "--data", str(file), "--out", str(tmp_path / "out"), *small]) == 0
    result = json.loads((tmp_path / "out" / "census.json").read_text())
    assert list(result["models"]) == ["mmoe", "shared_bottom", "single_task"]
    for row in result["models"].values():
        assert len(row["test_auc"]) == len(row["valid_auc"]) == 2
        assert list(row["lrs"]) == ["0.00025", "0.0005", "0.001", "0.002"]
        chosen = row["lrs"][f"{row['lr']:g}"]
        assert chosen["test_auc_mean"] == row["test_auc_mean"]
        assert chosen["valid_auc_mean"] == max(rate["valid_auc_mean"] for rate in row["lrs"].values())
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"census.json", "census_auc.png", "census_gates.png"}
    assert "shared bottom" in capsys.readouterr().out


def test_synthetic_command(tmp_path, capsys):
    small = ["--seeds", "2", "--steps", "20", "--eval-every", "10", "--eval-rows", "64", "--d-in", "10"]
    assert main(["mmoe-synthetic", "--out", str(tmp_path), *small]) == 0
    result = json.loads((tmp_path / "synthetic.json").read_text())
    assert result["steps"] == [0, 10, 20]
    assert list(result["correlations"]) == ["0.5", "0.9", "1"]
    for row in (row for models in result["correlations"].values() for row in models.values()):
        assert [len(losses) for losses in row["losses"]] == [3, 3]
        assert list(row["lrs"]) == ["0.001", "0.01"]
        last = sum(losses[-1] for losses in row["losses"]) / 2
        assert row["lrs"][f"{row['lr']:g}"] == pytest.approx(last) == pytest.approx(min(row["lrs"].values()))
    assert (tmp_path / "synthetic.png").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["mmoe-cencus"], "unknown recipe 'mmoe-cencus'. Did you mean 'mmoe-census'"),
        (["mmoe-census", "--data", "nothing.gz"], "no such file: nothing.gz"),
        (["mmoe-synthetic", "--correlations", "1.5"], "correlation must be between -1 and 1, got 1.5"),
        (["mmoe-synthetic", "--models", "mmo"], "unknown model 'mmo'. Did you mean 'mmoe'"),
        (["mmoe-synthetic", "--seeds", "0"], "seeds must have at least one value, got none"),
        (["mmoe-synthetic", "--alphas", "1", "2", "--betas", "0"], "alphas and betas must be as many, got 2 and 1"),
        (["mmoe-synthetic", "--steps", "0"], "steps must be a whole number >= 1, got 0"),
    ],
)
def test_what_a_command_cannot_use(arguments, message, capsys):
    try:
        status = main(arguments)
    except SystemExit as stopped:  # a value that the parser refuses
        status = stopped.code
    assert status == 2
    captured = capsys.readouterr()
    assert message in " ".join((captured.err + captured.out).replace("│", " ").split())


def test_no_learning_rate(file):
    with pytest.raises(ValueError, match="lrs must have at least one value, got none"):
        run_census([file], lrs=[])


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


def test_labels_correlate_more_as_tasks_do():
    measured = []
    for correlation in (0.0, 0.5, 0.9, 1.0):
        _, y_TK = make_problem(correlation, 0, SyntheticOptions()).draw(20000, torch.Generator().manual_seed(0))
        measured.append(torch.corrcoef(y_TK.T)[0, 1].item())
    assert measured == sorted(measured)
    assert abs(measured[0]) < 0.05
    assert measured[-1] > 0.95


@pytest.mark.parametrize("sharing", BOTTOMS)
def test_synthetic_training_lowers_the_loss_and_repeats(sharing):
    options = SyntheticOptions(d_in=10, steps=60, eval_every=30, eval_rows=256)
    problem = make_problem(0.9, 0, options)
    first, again = (fit_synthetic(problem, sharing, 0, 1e-2, options) for _ in range(2))
    assert first == again
    assert first.losses[-1] < 0.5 * first.losses[0]
