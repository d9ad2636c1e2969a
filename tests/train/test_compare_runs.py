"""Which folders are runs, and what is read of them."""

import pytest
from finished_runs import write_run

from fastmoe.train.compare_runs import find_runs, read_run


def test_a_list_of_paths_and_patterns(tmp_path):
    for name in ("x1", "x2", "y"):
        (tmp_path / name).mkdir()
    (tmp_path / "x3").touch()
    found = find_runs(f"{tmp_path}/y, {tmp_path}/x*")
    assert [path.name for path in found] == ["y", "x1", "x2"]


@pytest.mark.parametrize("name", ["a[1]", "a,b", "a*", " a"])
def test_a_folder_that_exists_is_neither_list_nor_pattern(name, tmp_path):
    for each in (name, "a1", "ab"):
        (tmp_path / each).mkdir()
    assert find_runs(str(tmp_path / name)) == [tmp_path / name]


def test_folders_with_brackets_in_a_list(tmp_path):
    for name in ("a[1]", "b"):
        (tmp_path / name).mkdir()
    assert find_runs(f"{tmp_path}/a[1],{tmp_path}/b") == [tmp_path / "a[1]", tmp_path / "b"]


def test_a_list_longer_than_a_file_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = [f"run-{i:060}" for i in range(6)]
    for name in names:
        (tmp_path / name).mkdir()
    assert [str(path) for path in find_runs(",".join(names))] == names


def test_one_model_of_a_run_of_two(tmp_path):
    folder = tmp_path / "twins"
    write_run(folder, [8.0, 4.0], both=[8.0, 3.0])
    for kind, losses in (("dense", [8.0, 4.0]), ("moe", [8.0, 3.0])):
        (folder / kind).mkdir()
        run = read_run(folder / kind)
        assert (run.kind, run.losses) == (kind, losses)
    with pytest.raises(ValueError, match=r"has two models: give .*dense or .*moe"):
        read_run(folder)


def test_a_run_whose_folder_is_named_dense(tmp_path):
    write_run(tmp_path / "twins", [8.0, 4.0], both=[8.0, 3.0])
    write_run(tmp_path / "twins" / "dense", [8.0, 1.0], kind="moe")
    run = read_run(tmp_path / "twins" / "dense")
    assert (run.kind, run.losses) == ("moe", [8.0, 1.0])


@pytest.mark.parametrize("kind", ["dense", "moe"])
def test_an_unfinished_run_within_the_folder_of_another(kind, tmp_path):
    write_run(tmp_path / "a", [8.0, 4.0], kind=kind)
    (tmp_path / "a" / "dense").mkdir()
    with pytest.raises(ValueError, match=r"a/dense is no finished run: there is no .*a/dense/results.json"):
        read_run(tmp_path / "a" / "dense")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"corpus.sha256": ...}, "corpus.sha256 must be a string; got nothing"),
        ({"corpus.sha256": ["x"]}, "corpus.sha256 must be a string; got ['x']"),
        ({"corpus.name": ...}, "corpus.name must be a string; got nothing"),
        ({"corpus": "text"}, "corpus.name must be a string; got nothing"),
        ({"machine.cpu": ...}, "machine.cpu must be a string; got nothing"),
        ({"config.moe": ...}, "config.moe must be an object; got nothing"),
        ({"config.run.seed": "1"}, "config.run.seed must be a whole number; got '1'"),
        ({"config.optim.batch_size": ...}, "config.optim.batch_size must be a whole number; got nothing"),
        ({"results.dense": {}}, "results.dense.train_flops_per_token must be a finite number; got nothing"),
        ({"histories": []}, "histories must be an object; got []"),
        ({"histories": {}}, "histories must be of one model or of two; it is of 0"),
        ({"histories.dense": None}, "histories.dense.valid_steps must be a list; got nothing"),
        ({"histories.dense.valid_losses": [8.0]}, "as many valid_seconds and valid_losses as valid_steps"),
        ({"histories.dense.valid_seconds": [0.0]}, "as many valid_seconds and valid_losses as valid_steps"),
        ({"histories.dense.valid_losses": [8.0, "4"]}, "valid_losses must be numbers; got [8.0, '4']"),
        ({"histories.dense.valid_steps": [0, float("nan")]}, "valid_steps must be finite numbers; got [0, nan]"),
        (
            {"results.dense.train_flops_per_token": float("inf")},
            "train_flops_per_token must be a finite number; got inf",
        ),
    ],
)
def test_results_that_lack_something(changes, message, tmp_path):
    write_run(tmp_path / "a", [8.0, 4.0], changes=changes)
    with pytest.raises(ValueError) as refused:
        read_run(tmp_path / "a")
    assert str(refused.value).startswith(f"{tmp_path / 'a' / 'results.json'}: ")
    assert message in str(refused.value)
    assert "\n" not in str(refused.value)


def test_no_evaluation(tmp_path):
    write_run(tmp_path / "a", [])
    with pytest.raises(ValueError, match=r"results.json: .* and at least one; got 0, 0 and 0"):
        read_run(tmp_path / "a")


@pytest.mark.parametrize("content", [b"[]", b"{", b"", b"\xff", b"null"])
def test_a_file_that_is_no_results(content, tmp_path):
    (tmp_path / "results.json").write_bytes(content)
    with pytest.raises(ValueError) as refused:
        read_run(tmp_path)
    assert str(refused.value).startswith(f"{tmp_path / 'results.json'}: ")
