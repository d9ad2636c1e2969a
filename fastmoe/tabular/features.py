"""Census-Income as tensors: the two tasks of the MMoE paper (section 6.3, group 1), split and one-hot."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import polars as pl
import torch
from torch import Tensor

from fastmoe._errors import unknown_name
from fastmoe._seeds import mix
from fastmoe.tabular.census import (
    AMOUNTS,
    COLUMNS,
    COUNTS,
    EXCLUDED,
    INCOMES,
    NEVER_MARRIED,
    NOMINAL,
    TASKS,
    read_census,
)

NAMES = ("train", "valid", "test")
SHARES = (0.6, 0.2, 0.2)


@dataclass(frozen=True)
class Rows:
    """Features `(T, D)` and labels `(T, K)`, 0 or 1, float32."""

    x_TD: Tensor
    y_TK: Tensor

    def __len__(self) -> int:
        return len(self.x_TD)


@dataclass(frozen=True)
class Census:
    """Rows to train on, to stop early by, and to report; `files` have the name and sha256 of each file of theirs."""

    train: Rows
    valid: Rows
    test: Rows
    features: tuple[str, ...]
    files: tuple[dict[str, str], ...]
    tasks: tuple[str, ...] = TASKS


def load_census(paths: Sequence[Path], split_seed: int = 0, exclude: Sequence[str] = ()) -> Census:
    """The set, split and prepared.

    Args:
        paths: one file, split 60/20/20; or the archive's two, the training file first, of which the second is halved
            into validation and test rows as in the paper.
        split_seed: of the split.
        exclude: columns that are no features, besides `census.EXCLUDED`.

    Raises:
        ValueError: not one or two files, files of another kind, too few rows for both classes in each part, or columns
            that are not there.
    """
    check_exclude(exclude)
    if len(paths) not in (1, 2):
        raise ValueError(f"data must be one file, or the training file and the test file; got {len(paths)} files")
    tables = [read_census(path) for path in paths]
    if len(tables) == 2:
        check_two(tables[0], tables[1])
    frames = dict(zip(NAMES, split(tables, split_seed), strict=True))
    labels_of = {name: labels(frame) for name, frame in frames.items()}
    for name, y_TK in labels_of.items():
        _check_classes(name, y_TK)
    encoder = Encoder(frames["train"], exclude)
    parts = {name: Rows(encoder(frame), labels_of[name]) for name, frame in frames.items()}
    files = tuple({"name": path.name, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()} for path in paths)
    return Census(parts["train"], parts["valid"], parts["test"], encoder.names, files)


def check_two(train: pl.DataFrame, test: pl.DataFrame) -> None:
    if train.equals(test):
        raise ValueError("data must be one file, or two with other rows each; got the same rows twice")
    if train.height < test.height:
        raise ValueError(
            "of two files the first is to train on and must be the larger, as census-income.data is; got "
            f"{train.height} rows, then {test.height}"
        )


def split(frames: Sequence[pl.DataFrame], seed: int) -> list[pl.DataFrame]:
    """Rows to train on, for validation, for the test."""
    shares = SHARES if len(frames) == 1 else (0.0, 0.5, 0.5)
    last = frames[-1]
    generator = torch.Generator().manual_seed(mix(seed, "split"))
    shuffled = last[torch.randperm(last.height, generator=generator).tolist()]
    train, valid = round(shares[0] * last.height), round(shares[1] * last.height)
    parts = [shuffled[:train], shuffled[train : train + valid], shuffled[train + valid :]]
    return parts if len(frames) == 1 else [frames[0], *parts[1:]]


def labels(frame: pl.DataFrame) -> Tensor:
    income = frame["income"].replace_strict(INCOMES, return_dtype=pl.Float32)
    single = (frame["marital_status"] == NEVER_MARRIED).cast(pl.Float32)
    return torch.stack([torch.from_numpy(column.to_numpy().copy()) for column in (income, single)], dim=1)


class Encoder:
    """Turns rows into features, by what the rows to train on have: each value of a nominal column is a feature, 0 or
    1, and one that they lack is none; amounts are taken as log(1 + amount); numbers have mean 0 and deviation 1, or 0
    where all are equal."""

    def __init__(self, train: pl.DataFrame, exclude: Sequence[str] = ()) -> None:
        self.amounts, self.counts, self.nominal = (
            [name for name in names if name not in exclude] for names in (AMOUNTS, COUNTS, NOMINAL)
        )
        self.values = train.select(self.nominal).to_dummies(separator="=").columns
        numbers_TC = self._numbers(train)
        constant_C = (numbers_TC == numbers_TC[0]).all(0)
        self.mean_C = numbers_TC.mean(0)
        variance_C = (numbers_TC - self.mean_C).square().sum(0) / (len(numbers_TC) - 1)
        self.std_C = variance_C.sqrt().masked_fill(constant_C, 1.0)
        self.names = (*self.amounts, *self.counts, *self.values)

    def __call__(self, frame: pl.DataFrame) -> Tensor:
        dummies = frame.select(self.nominal).to_dummies(separator="=")
        absent = [pl.lit(0, dtype=pl.UInt8).alias(name) for name in self.values if name not in dummies.columns]
        values = dummies.with_columns(absent).select(self.values).to_numpy().reshape(frame.height, len(self.values))
        numbers_TC = (self._numbers(frame) - self.mean_C) / self.std_C
        return torch.cat([numbers_TC.float(), torch.from_numpy(values).float()], dim=1)

    def _numbers(self, frame: pl.DataFrame) -> Tensor:
        columns = frame.select(pl.col(self.amounts).log1p(), pl.col(self.counts))
        return torch.from_numpy(columns.to_numpy().reshape(frame.height, columns.width).astype("float64"))


def check_exclude(exclude: Sequence[str]) -> None:
    for name in exclude:
        if name not in COLUMNS:
            raise unknown_name("column", name, COLUMNS)
    if not set(COLUMNS) - {*EXCLUDED, *exclude}:
        raise ValueError("exclude must leave at least one column as a feature, got all of them")


def _check_classes(name: str, y_TK: Tensor) -> None:
    for task, label_T in zip(TASKS, y_TK.unbind(1), strict=True):
        positives = int(label_T.sum())
        if not 0 < positives < len(label_T):
            raise ValueError(
                f"the {name} rows must have both classes of the task {task!r}; {positives} of {len(label_T)} are "
                "positive: are the data too few?"
            )
