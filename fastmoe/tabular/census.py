"""Reads the Census-Income (KDD) set: https://archive.ics.uci.edu/dataset/117/census+income+kdd."""

import io
from pathlib import Path

import polars as pl

# In the order of the file. `instance_weight` is the row's weight in the population, which the set's description tells
# a classifier not to use.
COLUMNS = (
    "age", "class_of_worker", "industry_code", "occupation_code", "education", "wage_per_hour", "enrolled_in_edu",
    "marital_status", "industry", "occupation", "race", "hispanic_origin", "sex", "union_member", "unemployment_reason",
    "employment_status", "capital_gains", "capital_losses", "dividends", "tax_filer_status", "previous_region",
    "previous_state", "household_and_family", "household_summary", "instance_weight", "migration_msa", "migration_reg",
    "migration_within_reg", "same_house_last_year", "previous_in_sunbelt", "num_persons_worked_for",
    "family_members_under_18", "father_birth_country", "mother_birth_country", "self_birth_country", "citizenship",
    "self_employed", "veterans_questionnaire", "veterans_benefits", "weeks_worked", "year", "income",
)  # fmt: skip
AMOUNTS = ("wage_per_hour", "capital_gains", "capital_losses", "dividends")  # mostly 0, with a long tail
COUNTS = ("age", "num_persons_worked_for", "weeks_worked")
INCOMES = {"- 50000.": 0, "50000+.": 1}
NEVER_MARRIED = "Never married"
MARITAL_STATUSES = (
    NEVER_MARRIED, "Married-civilian spouse present", "Married-A F spouse present", "Married-spouse absent",
    "Separated", "Divorced", "Widowed",
)  # fmt: skip
TASKS = ("income above 50K", "never married")
EXCLUDED = ("education", "marital_status", "instance_weight", "income")
"""No features: what the paper's tasks predict (section 6.3), and the weight."""
NOMINAL = tuple(name for name in COLUMNS if name not in (*AMOUNTS, *COUNTS, *EXCLUDED))

ONE_ROW = "a row is 42 values with commas between them and no header, as in census-income.data and census-income.test"


def read_census(path: Path) -> pl.DataFrame:
    """The rows of a file, as it comes from the archive or compressed by gzip: numbers as float64, the rest as text.

    Raises:
        ValueError: no such file, none of this set, or a value is missing or wrong; the message says what was expected
            and what came.
    """
    if not path.is_file():
        raise ValueError(f"{path} is a folder: give a file" if path.is_dir() else f"no such file: {path}")
    try:
        frame = pl.read_csv(io.BytesIO(path.read_bytes()), has_header=False, infer_schema=False, quote_char=None)
    except (pl.exceptions.PolarsError, OSError) as error:  # OSError: a broken gzip file
        raise ValueError(f"{path}: {ONE_ROW}; got what is no table: {str(error).splitlines()[0]}") from error
    if frame.width != len(COLUMNS):
        raise ValueError(f"{path}: {ONE_ROW}; got {frame.height} rows of {frame.width}")
    frame = frame.rename(dict(zip(frame.columns, COLUMNS, strict=True)))
    frame = frame.with_columns(pl.all().str.strip_chars())
    _check_complete(frame, path)
    _check_values(frame, "income", list(INCOMES), path)
    _check_values(frame, "marital_status", list(MARITAL_STATUSES), path)
    return _with_numbers(frame, path)


def _check_complete(frame: pl.DataFrame, path: Path) -> None:
    for place, name in enumerate(COLUMNS, start=1):
        missing = (frame[name].is_null() | (frame[name] == "")).arg_true()
        if len(missing):
            raise ValueError(
                f"{path}: row {missing[0] + 1} has no {name} (value {place} of 42): is it blank or cut short? What is "
                "not known stands in this set as '?' or 'Not in universe'"
            )


def _check_values(frame: pl.DataFrame, name: str, known: list[str], path: Path) -> None:
    other = frame[name].filter(~frame[name].is_in(known))
    if len(other):
        place = COLUMNS.index(name) + 1
        raise ValueError(
            f"{path}: value {place} of a row ({name}) must be one of {known}; got {other[0]!r} and {len(other) - 1} "
            "more that are none"
        )


def _with_numbers(frame: pl.DataFrame, path: Path) -> pl.DataFrame:
    for name in (*AMOUNTS, *COUNTS):
        numbers = frame[name].cast(pl.Float64, strict=False)
        bad = frame[name].filter(numbers.is_null() | ~numbers.is_finite() | (numbers < 0))
        if len(bad):
            place = COLUMNS.index(name) + 1
            raise ValueError(f"{path}: value {place} of a row ({name}) must be a number >= 0; got {bad[0]!r}")
        frame = frame.with_columns(numbers)
    return frame
