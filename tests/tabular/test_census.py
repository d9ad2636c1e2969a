"""Census-Income from made-up files: reading, splitting, features."""

import gzip
import hashlib

import pytest
import torch
from census_rows import rows, write

pytest.importorskip("polars")

from fastmoe.tabular.census import COLUMNS, EXCLUDED, NOMINAL, read_census
from fastmoe.tabular.features import load_census


@pytest.fixture
def file(tmp_path):
    return write(tmp_path / "census-income.test", rows(200))


def test_columns_are_those_of_the_set():
    assert len(COLUMNS) == len(set(COLUMNS)) == 42
    assert len(NOMINAL) == 42 - 7 - 4


def test_reads_plain_and_compressed_files_alike(file, tmp_path):
    packed = tmp_path / "census-income.test.gz"
    packed.write_bytes(gzip.compress(file.read_bytes()))
    assert read_census(file).equals(read_census(packed))


def test_one_file_is_split_in_three(file):
    census = load_census([file])
    assert [len(part) for part in (census.train, census.valid, census.test)] == [120, 40, 40]
    assert census.train.x_TD.shape[1] == len(census.features)
    (one,) = census.files
    assert one == {"name": file.name, "sha256": hashlib.sha256(file.read_bytes()).hexdigest()}


def test_of_two_files_the_second_is_halved(file, tmp_path):
    census = load_census([write(tmp_path / "census-income.data", rows(250, seed=1)), file])
    assert [len(part) for part in (census.train, census.valid, census.test)] == [250, 100, 100]


def test_labels_and_features_are_of_the_same_row(tmp_path):
    lines = rows(150, seed=1)
    census = load_census([write(tmp_path / "data", lines), write(tmp_path / "test", rows(100))])
    fields = [line.split(", ") for line in lines]
    assert census.train.y_TK[:, 0].tolist() == [row[-1] == "50000+." for row in fields]
    assert census.train.y_TK[:, 1].tolist() == [row[7] == "Never married" for row in fields]
    child = census.features.index("household_summary=Child 18 or older")
    assert torch.equal(census.train.x_TD[:, child], census.train.y_TK[:, 1])


def test_what_the_tasks_predict_is_no_feature(file):
    assert not {name.split("=")[0] for name in load_census([file]).features} & set(EXCLUDED)


def test_every_nominal_value_is_one_feature_and_numbers_are_standardised(file):
    census = load_census([file])
    numbers_TC, values_TV = census.train.x_TD.split([7, len(census.features) - 7], dim=1)
    assert (values_TV.sum(1) == len(NOMINAL)).all()
    torch.testing.assert_close(numbers_TC.mean(0), torch.zeros(7), atol=1e-5, rtol=0)
    torch.testing.assert_close(numbers_TC.std(0), torch.ones(7))


def test_a_value_that_training_rows_lack_is_no_feature(file, tmp_path):
    odd = [line.replace("Mining", "Whaling") for line in rows(100, seed=2)]
    census = load_census([file, write(tmp_path / "odd", odd)])
    mining = census.features.index("industry=Mining")
    assert "industry=Whaling" not in census.features
    assert not census.test.x_TD[:, mining].any()
    assert census.test.x_TD.isfinite().all()


def test_the_split_is_by_its_seed(file):
    first, again, other = (load_census([file], split_seed=seed) for seed in (3, 3, 4))
    assert torch.equal(first.test.x_TD, again.test.x_TD)
    assert not torch.equal(first.test.y_TK, other.test.y_TK) or first.test.x_TD.shape != other.test.x_TD.shape


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda lines: [line.rsplit(", ", 1)[0] for line in lines], "42 values .* got 200 rows of 41"),
        (lambda lines: [lines[0], "1, 2, 3", *lines[1:]], r"42 values|the last value of a row must be"),
        (lambda lines: [", ".join(COLUMNS), *lines], "the last value .* got 'income' and 0 more"),
        (lambda lines: [line.replace("50000+.", "rich") for line in lines], "got 'rich' and"),
        (lambda lines: [line.replace("Never married", "single") for line in lines], "no row has 'Never married'"),
        (lambda lines: ["x" + lines[0], *lines[1:]], r"value 1 of a row \(age\) must be a number >= 0; got 'x"),
        (lambda lines: ["-" + lines[0], *lines[1:]], r"value 1 of a row \(age\) must be a number >= 0; got '-"),
        (lambda lines: [], "42 values"),
        (lambda lines: lines[:3], "both classes"),
    ],
)
def test_wrong_files(tmp_path, spoil, message):
    with pytest.raises(ValueError, match=message):
        load_census([write(tmp_path / "file", spoil(rows(200)))])


def test_wrong_paths(tmp_path, file):
    with pytest.raises(ValueError, match="no such file"):
        load_census([tmp_path / "none"])
    with pytest.raises(ValueError, match="one file, or the training file and the test file; got 3"):
        load_census([file] * 3)
    (tmp_path / "noise").write_bytes(bytes(range(256)) * 20)
    (tmp_path / "cut.gz").write_bytes(gzip.compress(file.read_bytes())[:500])
    for name in ("noise", "cut.gz"):
        with pytest.raises(ValueError, match="42 values"):
            load_census([tmp_path / name])
