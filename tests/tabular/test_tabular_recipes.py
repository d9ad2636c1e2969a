"""The recipes: which rate is chosen and what is reported of it, what they write, and what they refuse before training.

Training is scripted here, but for a few steps of each command; test_tabular_fit.py and test_tabular_synthetic.py have
the training itself.
"""

import json

import pytest

pytest.importorskip("polars")
pytest.importorskip("matplotlib")
pytest.importorskip("tyro")
pytest.importorskip("rich")

from census_rows import rows, write

from fastmoe.tabular import correlation, recipes
from fastmoe.tabular.command import census_table, main, synthetic_table
from fastmoe.tabular.correlation import run_synthetic
from fastmoe.tabular.features import load_census
from fastmoe.tabular.fit import Fit, FitOptions
from fastmoe.tabular.recipes import run_census
from fastmoe.tabular.synthetic import Curve, SyntheticOptions

SMALL_CENSUS = ["--seeds", "1", "--lrs", "0.001", "--d-expert", "4", "--max-steps", "2"]
SMALL_SYNTHETIC = ["--seeds", "1", "--lrs", "0.001", "--steps", "2", "--eval-rows", "64", "--d-in", "10"]


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    return write(tmp_path_factory.mktemp("census") / "census-income.test", rows(300))


@pytest.fixture
def fits(monkeypatch):
    """Scripts `fit`, and keeps what it was called with. Validation is best at the rate 0.2, the test at 0.1, the mean
    of both tasks' validation at another than either task's."""
    calls = []
    valid = {0.1: [0.5, 0.8], 0.2: [0.7, 0.7], 0.4: [0.75, 0.5]}

    def scripted(census, config, sharing, seed, lr, options):
        calls.append({"config": config, "sharing": sharing, "seed": seed, "lr": lr, "options": options})
        test = [0.9 - lr + seed / 100, 0.8 - lr + seed / 50]
        gates = [[lr, 1 - lr], [seed, 1 - seed]] if sharing == "mmoe" else None
        return Fit([value + seed / 10 for value in valid[lr]], test, [2 + seed, 3], 7, 99, 1.23, gates)

    monkeypatch.setattr(recipes, "fit", scripted)
    return calls


def test_the_rate_is_chosen_by_validation_and_reported_by_the_test(file, tmp_path, fits):
    result = run_census([file], [0, 1], tmp_path, models=["mmoe", "shared_bottom"], lrs=[0.1, 0.2, 0.4], show=str)
    for row in result["models"].values():
        assert row["lr"] == 0.2
        assert row["valid_auc_mean"] == pytest.approx((0.7 + 0.7 + 0.8 + 0.8) / 4)
        assert row["test_auc"] == [pytest.approx([0.7, 0.6]), pytest.approx([0.71, 0.62])]
        assert row["test_auc_mean"] == pytest.approx([0.705, 0.61])
        assert row["test_auc_std"] == pytest.approx([0.01 / 2**0.5, 0.02 / 2**0.5])
        assert row["best_epochs"] == [[2, 3], [3, 3]]
        assert list(row["lrs"]) == ["0.1", "0.2", "0.4"]
        assert row["lrs"]["0.1"]["test_auc_mean"] == pytest.approx([0.805, 0.71])
        assert row["lrs"]["0.1"]["valid_auc_mean"] == pytest.approx(0.7)
    assert result["models"]["mmoe"]["utilization"] == [[[0.2, 0.8], [0, 1]], [[0.2, 0.8], [1, 0]]]
    assert result["models"]["shared_bottom"]["utilization"] is None
    assert json.loads((tmp_path / "census.json").read_text()) == json.loads(json.dumps(result))


def test_every_model_is_trained_with_every_rate_and_seed_as_asked(file, tmp_path, fits, monkeypatch):
    loads = []
    monkeypatch.setattr(recipes, "load_census", lambda *args: loads.append(args) or load_census(*args))
    options = FitOptions(batch_size=7)
    result = run_census(
        [file], [3, 4], tmp_path, lrs=[0.1, 0.2], d_expert=5, options=options, split_seed=6, exclude=["age"], show=str
    )
    models = ["mmoe", "shared_bottom", "single_task"]
    got = [(call["sharing"], call["lr"], call["seed"]) for call in fits]
    assert got == [(model, lr, seed) for model in models for lr in (0.1, 0.2) for seed in (3, 4)]
    assert {call["config"].d_expert for call in fits} == {5}
    assert all(call["options"] is options for call in fits)
    assert loads == [([file], 6, ["age"])]
    assert result["data"]["split_seed"] == 6
    assert result["data"]["exclude"] == ["age"]
    assert result["options"]["lrs"] == [0.1, 0.2]
    assert result["seeds"] == [3, 4]


def test_what_the_census_figures_show(file, tmp_path, fits, monkeypatch):
    shown = {}
    monkeypatch.setattr(recipes, "plot_aucs", lambda aucs, tasks, path: shown.update(aucs=aucs))
    monkeypatch.setattr(recipes, "plot_gates", lambda gates, tasks, path: shown.update(gates=gates))
    result = run_census([file], range(7), tmp_path, lrs=[0.2], show=str)["models"]
    assert shown["aucs"] == {model: row["test_auc"] for model, row in result.items()}
    assert shown["gates"] == {f"seed {seed}": [[0.2, 0.8], [seed, 1 - seed]] for seed in range(7)}


def test_gates_of_an_earlier_run_do_not_stay(file, tmp_path, fits):
    run_census([file], [0], tmp_path, lrs=[0.1], show=str)
    assert (tmp_path / "census_gates.png").exists()
    run_census([file], [0], tmp_path, models=["shared_bottom"], lrs=[0.1], show=str)
    assert {path.name for path in tmp_path.iterdir()} == {"census.json", "census_auc.png"}


def cells(table):
    return [list(column.cells) for column in table.columns]


def test_the_census_table_has_test_aucs(file, tmp_path, fits):
    result = run_census([file], [0, 1], tmp_path, models=["mmoe"], lrs=[0.1, 0.2], show=str)
    assert cells(census_table(result)) == [["MMoE"], ["99"], ["0.2"], ["0.7050 ± 0.0071"], ["0.6100 ± 0.0141"]]


@pytest.fixture
def curves(monkeypatch):
    """Scripts `fit_synthetic`: the rate 0.1 is best at first and for seed 0, 0.2 at the end in the mean."""
    calls = []

    def scripted(problem, sharing, seed, lr, options):
        calls.append((problem, sharing, seed, lr, options))
        last = {0.1: [1.0, 4.0], 0.2: [2.0, 1.0]}[lr][seed]
        return Curve([0, 5], [9.0 + lr, last], 77)

    monkeypatch.setattr(correlation, "fit_synthetic", scripted)
    return calls


def test_the_synthetic_rate_is_chosen_by_the_mean_of_the_last_losses(tmp_path, curves):
    result = run_synthetic([0.5, 1.0], [0, 1], tmp_path, models=["mmoe"], lrs=[0.1, 0.2], show=str)
    for models in result["correlations"].values():
        row = {"lr": 0.2, "losses": [[9.2, 2.0], [9.2, 1.0]], "lrs": {"0.1": 2.5, "0.2": 1.5}}
        assert models == {"mmoe": row}
    assert cells(synthetic_table(result)) == [["MMoE"], ["77"], ["1.5000 ± 0.7071"], ["1.5000 ± 0.7071"]]
    assert json.loads((tmp_path / "synthetic.json").read_text()) == json.loads(json.dumps(result))


def test_every_seed_has_a_problem_which_all_models_and_rates_share(tmp_path, curves):
    options = SyntheticOptions(d_in=10)
    run_synthetic([0.5], [0, 1], tmp_path, models=["mmoe", "omoe"], lrs=[0.1, 0.2], options=options, show=str)
    got = [(sharing, lr, seed) for _, sharing, seed, lr, _ in curves]
    assert got == [(model, lr, seed) for model in ("mmoe", "omoe") for lr in (0.1, 0.2) for seed in (0, 1)]
    first, second = (problem for problem, *_ in curves[:2])
    assert (first.w_KD != second.w_KD).any()
    assert all(problem is (first, second)[seed] for problem, _, seed, _, _ in curves)
    assert all(given is options for *_, given in curves)


def test_census_command(file, tmp_path, capsys):
    assert main(["mmoe-census", "--data", str(file), "--out", str(tmp_path / "out"), *SMALL_CENSUS]) == 0
    result = json.loads((tmp_path / "out" / "census.json").read_text())
    assert list(result["models"]) == ["mmoe", "shared_bottom", "single_task"]
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"census.json", "census_auc.png", "census_gates.png"}
    assert "shared bottom" in capsys.readouterr().out


def test_synthetic_command(tmp_path):
    assert main(["mmoe-synthetic", "--out", str(tmp_path), *SMALL_SYNTHETIC]) == 0
    result = json.loads((tmp_path / "synthetic.json").read_text())
    assert result["steps"] == [0, 2]
    assert list(result["correlations"]) == ["0.5", "0.9", "1"]
    assert (tmp_path / "synthetic.png").exists()


def refused(arguments, capsys):
    """What the command says when it ends with 2."""
    try:
        status = main(arguments)
    except SystemExit as stopped:  # a value that the parser refuses
        status = stopped.code
    assert status == 2
    captured = capsys.readouterr()
    return " ".join((captured.err + captured.out).replace("│", " ").split())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["mmoe-cencus"], "unknown recipe 'mmoe-cencus'. Did you mean 'mmoe-census'"),
        (["mmoe-census", "--data", "nothing.gz"], "no such file: nothing.gz"),
        (["mmoe-census", "--data", "."], ". is a folder: give a file"),
        (["mmoe-census", "--data", "x", "--exclude", "agee"], "unknown column 'agee'. Did you mean 'age'"),
        (["mmoe-synthetic", "--correlations", "1.5"], "correlation must be between -1 and 1, got 1.5"),
        (["mmoe-synthetic", "--models", "mmo"], "unknown model 'mmo'. Did you mean 'mmoe'"),
        (["mmoe-synthetic", "--seeds", "0"], "seeds must have at least one value, got none"),
        (["mmoe-synthetic", "--alphas", "1", "2", "--betas", "0"], "alphas and betas must be as many, got 2 and 1"),
        (["mmoe-synthetic", "--steps", "0"], "steps must be a whole number >= 1, got 0"),
    ],
)
def test_what_a_command_cannot_use(arguments, message, capsys):
    assert message in refused(arguments, capsys)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--lrs", "0.001", "0.001"], "lrs must differ as they are printed here; got 0.001, 0.001"),
        (["--lrs", "0.001", "0.0010000001"], "lrs must differ as they are printed here; got 0.001, 0.001"),
        (["--models", "mmoe", "mmoe"], "models must differ as they are printed here; got mmoe, mmoe"),
        (["--lrs", "0.001", "-1"], "lrs must be a finite number >= 0, got -1.0"),
        (["--lrs", "0.001", "nan"], "lrs must be a finite number >= 0, got nan"),
        (["--out", "/dev/null/out"], "out must be a folder that can be written, got /dev/null/out: Not a directory"),
        (["--out", "/dev/null"], "out must be a folder that can be written, got /dev/null: File exists"),
    ],
)
@pytest.mark.parametrize("recipe", ["mmoe-census", "mmoe-synthetic"])
def test_what_is_refused_before_training(recipe, options, message, file, tmp_path, capsys, fits, curves):
    given = ["--data", str(file)] if recipe == "mmoe-census" else []
    out = [] if "--out" in options else ["--out", str(tmp_path)]
    assert message in refused([recipe, *given, *out, *options], capsys)
    assert not fits
    assert not curves
    assert not list(tmp_path.iterdir())


def test_correlations_must_differ(tmp_path, capsys, curves):
    message = refused(["mmoe-synthetic", "--out", str(tmp_path), "--correlations", "0.9", "0.9"], capsys)
    assert "correlations must differ as they are printed here; got 0.9, 0.9" in message
    assert not curves


@pytest.mark.parametrize("recipe", ["mmoe-census", "mmoe-synthetic"])
def test_a_rate_that_diverges_is_an_error(recipe, file, tmp_path, capsys):
    data, small = (["--data", str(file)], SMALL_CENSUS) if recipe == "mmoe-census" else ([], SMALL_SYNTHETIC)
    message = refused([recipe, *data, "--out", str(tmp_path), *small, "--lrs", "1e38"], capsys)
    assert "mmoe diverged" in message
    assert "at lr 1e+38 with seed 0: give lower lrs" in message
    assert not list(tmp_path.glob("*.json"))


def test_no_learning_rate(file):
    with pytest.raises(ValueError, match="lrs must have at least one value, got none"):
        run_census([file], lrs=[])
