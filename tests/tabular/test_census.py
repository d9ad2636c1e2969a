"""Census-Income from made-up files: reading, splitting, features."""

import gzip
import hashlib
import os
from pathlib import Path

import pytest
import torch

pytest.importorskip("polars")

from census_rows import rows, write

from fastmoe.tabular.census import AMOUNTS, COLUMNS, COUNTS, EXCLUDED, NOMINAL, read_census
from fastmoe.tabular.features import Encoder, load_census


@pytest.fixture
def file(tmp_path):
    return write(tmp_path / "census-income.test", rows(200))


def put(line, column, value):
    fields = line.split(", ")
    fields[COLUMNS.index(column)] = value
    return ", ".join(fields)


def test_columns_are_those_of_the_set():
    assert ", ".join(COLUMNS) == (
        "age, class_of_worker, industry_code, occupation_code, education, wage_per_hour, enrolled_in_edu, "
        "marital_status, industry, occupation, race, hispanic_origin, sex, union_member, unemployment_reason, "
        "employment_status, capital_gains, capital_losses, dividends, tax_filer_status, previous_region, "
        "previous_state, household_and_family, household_summary, instance_weight, migration_msa, migration_reg, "
        "migration_within_reg, same_house_last_year, previous_in_sunbelt, num_persons_worked_for, "
        "family_members_under_18, father_birth_country, mother_birth_country, self_birth_country, citizenship, "
        "self_employed, veterans_questionnaire, veterans_benefits, weeks_worked, year, income"
    )
    assert EXCLUDED == ("education", "marital_status", "instance_weight", "income")
    assert len(NOMINAL) == 42 - 7 - 4


@pytest.mark.skipif("FASTMOE_CENSUS" not in os.environ, reason="FASTMOE_CENSUS is the path of census-income.test")
def test_the_set_itself():
    path = Path(os.environ["FASTMOE_CENSUS"])
    frame = read_census(path)
    assert frame.height == 99762
    assert frame["income"].value_counts(sort=True)["count"].to_list() == [93576, 6186]
    assert (frame["marital_status"] == "Never married").sum() == 43143
    assert frame["age"].max() == 90
    assert frame["sex"].unique().sort().to_list() == ["Female", "Male"]
    assert frame["weeks_worked"].max() == 52
    assert len(load_census([path]).features) == 483


def test_reads_plain_and_compressed_files_alike(file, tmp_path):
    packed = tmp_path / "census-income.test.gz"
    packed.write_bytes(gzip.compress(file.read_bytes()))
    assert read_census(file).equals(read_census(packed))


def test_quotes_are_part_of_a_value(tmp_path):
    lines = rows(3)
    lines[1] = put(lines[1], "industry", '"Mining')
    assert read_census(write(tmp_path / "file", lines))["industry"][1] == '"Mining'


def test_one_file_is_split_in_three(file):
    census = load_census([file])
    assert [len(part) for part in (census.train, census.valid, census.test)] == [120, 40, 40]
    assert census.train.x_TD.shape[1] == len(census.features)
    (one,) = census.files
    assert one == {"name": file.name, "sha256": hashlib.sha256(file.read_bytes()).hexdigest()}


def test_of_two_files_the_second_is_halved(file, tmp_path):
    census = load_census([write(tmp_path / "census-income.data", rows(250, seed=1)), file])
    assert [len(part) for part in (census.train, census.valid, census.test)] == [250, 100, 100]


def test_the_second_file_is_shuffled_before_it_is_halved(tmp_path):
    lines = [put(line, "sex", "Male" if i < 50 else "Female") for i, line in enumerate(rows(100))]
    census = load_census([write(tmp_path / "data", [*lines, *rows(50, seed=1)]), write(tmp_path / "test", lines)])
    male = census.features.index("sex=Male")
    for part in (census.valid, census.test):
        assert 10 < part.x_TD[:, male].sum() < 40


def test_labels_and_features_are_of_the_same_row(tmp_path):
    lines = rows(150, seed=1)
    census = load_census([write(tmp_path / "data", lines), write(tmp_path / "test", rows(100))])
    fields = [line.split(", ") for line in lines]
    assert census.train.y_TK[:, 0].tolist() == [row[-1] == "50000+." for row in fields]
    assert census.train.y_TK[:, 1].tolist() == [row[7] == "Never married" for row in fields]
    child = census.features.index("household_summary=Child 18 or older")
    assert torch.equal(census.train.x_TD[:, child], census.train.y_TK[:, 1])


@pytest.mark.parametrize("exclude", [(), ("age", "dividends", "household_summary", "education")])
def test_features_are_all_columns_but_those_excluded(file, exclude):
    census = load_census([file], exclude=exclude)
    assert {name.split("=")[0] for name in census.features} == set(COLUMNS) - set(EXCLUDED) - set(exclude)
    assert census.train.x_TD.shape == (120, len(census.features))


def test_columns_that_cannot_be_excluded(file):
    with pytest.raises(ValueError, match=r"unknown column 'house_hold_summary'. Did you mean 'household_summary'"):
        load_census([file], exclude=["house_hold_summary"])
    with pytest.raises(ValueError, match="exclude must leave at least one column as a feature, got all of them"):
        load_census([file], exclude=COLUMNS)


@pytest.mark.parametrize("exclude", [NOMINAL, (*AMOUNTS, *COUNTS)])
def test_numbers_alone_and_values_alone_are_features_too(file, exclude):
    census = load_census([file], exclude=exclude)
    assert census.train.x_TD.shape == (120, len(census.features))


def encoded(tmp_path, column, train, test):
    """The first feature, `column` as a number, of rows with these values."""
    base = rows(1)[0]
    frames = [read_census(write(tmp_path / "f", [put(base, column, str(v)) for v in part])) for part in (train, test)]
    encoder = Encoder(frames[0])
    return encoder(frames[1])[:, encoder.names.index(column)].tolist()


def test_amounts_are_logarithms_and_counts_are_not(tmp_path):
    first, second, third = encoded(tmp_path, "dividends", [0, 9, 99, 5], [0, 9, 99])
    assert third - second == pytest.approx(second - first)
    first, second, third = encoded(tmp_path, "age", [0, 9, 99, 5], [10, 20, 30])
    assert third - second == pytest.approx(second - first)


@pytest.mark.parametrize("value", [0, 0.1])
def test_a_number_that_training_rows_have_once_stays_small(tmp_path, value):
    first, second = encoded(tmp_path, "dividends", [value] * 7, [value, 99999])
    assert first == pytest.approx(0, abs=1e-6)
    assert 0 < second < 12


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
        (lambda lines: [lines[0], "1, 2, 3", *lines[1:]], r"row 2 has no occupation_code \(value 4 of 42\)"),
        (lambda lines: [lines[0], lines[0] + ", 3", *lines[1:]], "42 values"),
        (lambda lines: [*lines[:5], "", *lines[5:]], r"row 6 has no age .* is it blank"),
        (lambda lines: [", ".join(COLUMNS), *lines], r"value 42 .*\(income\) must be .* got 'income' and 0 more"),
        (lambda lines: [], "42 values"),
        (lambda lines: lines[:3], "both classes"),
    ],
)
def test_wrong_files(tmp_path, spoil, message):
    with pytest.raises(ValueError, match=message):
        load_census([write(tmp_path / "file", spoil(rows(200)))])


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        ("income", "rich", r"value 42 of a row \(income\) must be one of \['- 50000.', '50000\+.'\]; got 'rich'"),
        ("income", "", "row 3 has no income"),
        ("marital_status", "", "row 3 has no marital_status"),
        ("marital_status", "?", r"value 8 of a row \(marital_status\) must be one of \['Never married', .* got '\?'"),
        ("marital_status", "Never-married", "got 'Never-married' and 0 more"),
        ("industry", "", r"row 3 has no industry \(value 9 of 42\).* as '\?'"),
        ("age", "x1", r"value 1 of a row \(age\) must be a number >= 0; got 'x1'"),
        ("age", "-1", r"\(age\) must be a number >= 0; got '-1'"),
        ("dividends", "inf", r"\(dividends\) must be a number >= 0; got 'inf'"),
        ("dividends", "nan", r"\(dividends\) must be a number >= 0; got 'nan'"),
    ],
)
def test_wrong_values_are_named_with_their_file_and_column(tmp_path, column, value, message):
    lines = rows(200)
    lines[2] = put(lines[2], column, value)
    lines[3] = put(lines[3], "industry", "null")
    with pytest.raises(ValueError, match=f"census.file: {message}|census.file: .*{message}"):
        load_census([write(tmp_path / "census.file", lines)])


def test_two_files_that_are_not_the_set_s(tmp_path, file):
    packed = tmp_path / "packed.gz"
    packed.write_bytes(gzip.compress(file.read_bytes()))
    for again in (file, packed):
        with pytest.raises(ValueError, match="two with other rows each; got the same rows twice"):
            load_census([file, again])
    larger = write(tmp_path / "larger", rows(300, seed=1))
    with pytest.raises(ValueError, match=r"the first is to train on and must be the larger.* got 200 rows, then 300"):
        load_census([file, larger])


def test_files_of_one_name_are_both_kept(tmp_path, file):
    (tmp_path / "train").mkdir()
    larger = write(tmp_path / "train" / file.name, rows(300, seed=1))
    digests = [hashlib.sha256(path.read_bytes()).hexdigest() for path in (larger, file)]
    assert load_census([larger, file]).files == tuple({"name": file.name, "sha256": digest} for digest in digests)


def test_wrong_paths(tmp_path, file):
    with pytest.raises(ValueError, match="no such file"):
        load_census([tmp_path / "none"])
    with pytest.raises(ValueError, match="is a folder: give a file"):
        load_census([tmp_path])
    with pytest.raises(ValueError, match="one file, or the training file and the test file; got 3"):
        load_census([file] * 3)
    (tmp_path / "noise").write_bytes(bytes(range(256)) * 20)
    (tmp_path / "cut.gz").write_bytes(gzip.compress(file.read_bytes())[:500])
    for name in ("noise", "cut.gz"):
        with pytest.raises(ValueError, match="42 values"):
            load_census([tmp_path / name])
