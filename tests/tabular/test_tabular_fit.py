"""Training on census rows: what is trained, when it stops, and which rows and epoch each reported number is of."""

import copy

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("polars")

from census_rows import rows, write

from fastmoe.models.mmoe import BOTTOMS, MultiTask, MultiTaskConfig
from fastmoe.tabular import fit as fit_module
from fastmoe.tabular.auc import auc
from fastmoe.tabular.features import Census, Rows, load_census
from fastmoe.tabular.fit import FitOptions, batches_of_epochs, fit, task_losses

SHORT = FitOptions(batch_size=64, max_steps=20)


@pytest.fixture(scope="module")
def census(tmp_path_factory):
    return load_census([write(tmp_path_factory.mktemp("census") / "census-income.test", rows(1000))])


@pytest.fixture
def small():
    """24 rows to train on, 12 for validation, 8 for the test."""

    def part(number):
        return Rows(torch.randn(number, 5), torch.arange(2 * number).reshape(number, 2).div(3).floor() % 2)

    return Census(part(24), part(12), part(8), ("a",) * 5, ())


@pytest.fixture
def models(monkeypatch):
    """The networks that `fit` makes, in order, each with its first weights."""
    made = []

    def make(config, sharing):
        made.append(MultiTask(config, sharing))
        made[-1].first = copy.deepcopy(made[-1].state_dict())
        return made[-1]

    monkeypatch.setattr(fit_module, "MultiTask", make)
    return made


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


def test_a_task_s_loss_is_its_cross_entropy():
    logits_TK, y_TK = torch.randn(5, 2), torch.randint(2, (5, 2)).float()
    p_TK = logits_TK.sigmoid()
    want_K = -(y_TK * p_TK.log() + (1 - y_TK) * (1 - p_TK).log()).mean(0)
    torch.testing.assert_close(task_losses(logits_TK, y_TK), want_K)


def test_a_step_follows_the_sum_of_the_losses(small, models, monkeypatch):
    monkeypatch.setattr(torch.optim, "Adam", lambda parameters, lr, fused: torch.optim.SGD(parameters, lr))
    fit(small, MultiTaskConfig(5), "mmoe", 0, 0.5, FitOptions(max_steps=1))
    want = MultiTask(MultiTaskConfig(5), "mmoe")
    want.load_state_dict(models[0].first)
    logits_TK, y_TK = want(small.train.x_TD), small.train.y_TK
    loss = sum(F.binary_cross_entropy_with_logits(logits_TK[:, k], y_TK[:, k]) for k in range(2))
    gradients = torch.autograd.grad(loss, list(want.parameters()))
    for got, before, gradient in zip(models[0].parameters(), want.parameters(), gradients, strict=True):
        torch.testing.assert_close(got, before - 0.5 * gradient)


def test_the_seed_sets_the_weights_and_the_order(small, models, monkeypatch):
    orders = []

    def train_epoch(model, optimizer, rows, batches):
        assert rows is small.train
        orders.append(torch.cat(batches).tolist())

    monkeypatch.setattr(fit_module, "train_epoch", train_epoch)
    for sharing, seed in (("mmoe", 0), ("mmoe", 0), ("mmoe", 1), ("shared_bottom", 0)):
        fit(small, MultiTaskConfig(5), sharing, seed, 1e-3, FitOptions(max_epochs=1))
    assert orders[0] == orders[1] == orders[3] != orders[2]
    gates = [model.first["bottom.levels.0.gates.0.weight"] for model in models[:3]]
    assert torch.equal(gates[0], gates[1])
    assert not torch.equal(gates[0], gates[2])


def test_every_row_is_in_every_epoch_once():
    first, second = batches_of_epochs(600, 0, FitOptions(max_epochs=2))
    assert [len(batch) for batch in first] == [512, 88]
    assert not torch.equal(torch.cat(first), torch.cat(second))
    for batches in (first, second):
        assert torch.cat(batches).sort().values.tolist() == list(range(600))


@pytest.mark.parametrize(("max_steps", "epochs"), [(5, [5]), (6, [6]), (8, [6, 2]), (None, [6] * 9)])
def test_max_steps_is_kept(max_steps, epochs):
    options = FitOptions(batch_size=100, max_steps=max_steps, max_epochs=9)
    assert [len(batches) for batches in batches_of_epochs(600, 0, options)] == epochs


def test_what_is_reported_is_of_the_rows_that_it_is_said_to_be_of(census, models):
    done = fit(census, MultiTaskConfig(len(census.features), d_expert=4), "mmoe", 0, 1e-2, FitOptions(max_epochs=1))
    model = models[0]
    for reported, part in ((done.valid_auc, census.valid), (done.test_auc, census.test)):
        assert reported == [auc(model(part.x_TD)[:, k], part.y_TK[:, k]) for k in range(2)]
    gates = [census.test.x_TD @ gate.weight.T for gate in model.bottom.levels[0].gates]
    means = [gate_TE.softmax(1).mean(0) for gate_TE in gates]
    torch.testing.assert_close(torch.tensor(done.utilization), torch.stack(means))


VALID = [(0.5, 0.5), (0.9, 0.4), (0.6, 0.8), (0.6, 0.6), (0.6, 0.9), (0.9, 0.5), (0.6, 0.5), (0.6, 0.5)]
"""By epoch and task. The means are best at epoch 5 (0.75); up to there they rise, stand and fall: 0.5 0.65 0.7 0.6."""


@pytest.fixture
def scripted(monkeypatch):
    """AUCs as in VALID, told by the number of rows: validation has 12; of 8, the test rows, they are 1 less those.
    What it returns starts them anew."""
    calls = {12: 0, 8: 0}

    def scripted_auc(scores_T, labels_T):
        assert len(scores_T) == len(labels_T)
        epoch, task = divmod(calls[len(labels_T)], 2)
        calls[len(labels_T)] += 1
        return VALID[epoch][task] if len(labels_T) == 12 else 1 - VALID[epoch][task]

    monkeypatch.setattr(fit_module, "auc", scripted_auc)
    return lambda: calls.update({12: 0, 8: 0})


@pytest.mark.parametrize(
    ("sharing", "patience", "best", "epochs"),
    [
        ("mmoe", 1, [3, 3], 4),
        ("shared_bottom", 2, [5, 5], 7),
        ("single_task", 2, [2, 5], 7),  # task 0 stands still at epoch 4 already
        ("single_task", 1, [2, 3], 4),
    ],
)
def test_stops_by_validation_and_reports_its_best_epoch(small, scripted, sharing, patience, best, epochs):
    done = fit(small, MultiTaskConfig(5), sharing, 0, 1e-3, FitOptions(patience=patience))
    assert (done.best_epochs, done.epochs) == (best, epochs)
    valid = [VALID[epoch - 1][task] for task, epoch in enumerate(best)]
    assert done.valid_auc == valid
    assert done.test_auc == [1 - value for value in valid]


def test_gates_are_of_the_best_epoch(small, models, scripted):
    done = fit(small, MultiTaskConfig(5), "mmoe", 0, 1e-2, FitOptions(patience=1))
    assert (done.best_epochs, done.epochs) == ([3, 3], 4)
    scripted()
    until_best = fit(small, MultiTaskConfig(5), "mmoe", 0, 1e-2, FitOptions(max_epochs=3))
    assert done.utilization == until_best.utilization
    models[0](small.test.x_TD)
    assert done.utilization != models[0].bottom.last_stats.utilization[0].tolist()


def test_stops_when_validation_does_not_rise(census):
    config = MultiTaskConfig(len(census.features), d_expert=4)
    done = fit(census, config, "mmoe", 0, 0.0, FitOptions(max_epochs=50, patience=3))
    assert (done.epochs, done.best_epochs) == (4, [1, 1])


@pytest.mark.parametrize(
    ("lr", "message"),
    [
        (1e30, r"^mmoe diverged in epoch 1 at lr 1e\+30 with seed 7: give lower lrs$"),
        (-1.0, "lr must be a finite number >= 0, got -1.0"),
    ],
)
def test_learning_rates_that_cannot_be_used(small, lr, message):
    with pytest.raises(ValueError, match=message):
        fit(small, MultiTaskConfig(5), "mmoe", 7, lr, FitOptions(batch_size=4))
