"""Plain values: what a checkpoint keeps as JSON, and what an optimizer's options become there."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

PLAIN = (str, int, float, bool, type(None))
OF_THE_MODEL = ("params", "param_names")


def check_plain(name: str, value: object) -> None:
    """Raise a `ValueError` unless JSON gives back what it is given."""
    if isinstance(value, dict):
        for key, entry in value.items():
            if not isinstance(key, str):
                raise ValueError(f"the keys of {name} must be strings, got {key!r}")
            check_plain(f"{name}[{key!r}]", entry)
    elif isinstance(value, list):
        for i, entry in enumerate(value):
            check_plain(f"{name}[{i}]", entry)
    elif not isinstance(value, PLAIN):
        raise ValueError(
            f"{name} must be a plain value (a number, a string, a bool, None; lists and dicts of them), "
            f"got {type(value).__name__}"
        )


def group_options(optimizer: Optimizer) -> list[dict[str, Any]]:
    """Each group's options as plain values, without its parameters.

    Raises:
        ValueError: an option that cannot be one.
    """
    return [
        {key: _plain(f"{key!r} of the optimizer's group {g}", value) for key, value in group.items() if _kept(key)}
        for g, group in enumerate(optimizer.param_groups)
    ]


def _kept(key: str) -> bool:
    return key not in OF_THE_MODEL


def _plain(name: str, value: object) -> Any:
    if isinstance(value, Tensor) and value.numel() == 1:
        return value.item()
    if isinstance(value, tuple | list):
        return [_plain(name, entry) for entry in value]
    check_plain(name, value)
    return value


def restore_options(optimizer: Optimizer, saved: Iterable[Mapping[str, Any]]) -> None:
    """Give each group the saved options; a tensor stays the tensor it is, and a tuple a tuple."""
    for group, options in zip(optimizer.param_groups, saved, strict=True):
        for key, value in options.items():
            group[key] = _restored(value, group.get(key))


@torch.no_grad()
def _restored(saved: Any, current: object) -> Any:
    if isinstance(current, Tensor) and isinstance(saved, int | float):
        return current.fill_(saved)
    if isinstance(current, tuple) and isinstance(saved, list):
        pairs = zip_longest(saved, current[: len(saved)])
        return tuple(_restored(s, c) for s, c in pairs)
    return saved
