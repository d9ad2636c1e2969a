"""What both experiments check before they train, and how they write."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from fastmoe._errors import check_choice, check_number
from fastmoe.models.mmoe import BOTTOMS

Show = Callable[[str], None]
"""Takes a line about each fit."""


def check_grid(models: Sequence[str], seeds: Sequence[int], lrs: Sequence[float]) -> None:
    """Refuse, before anything is trained, what cannot be run."""
    check_distinct("models", models)
    check_distinct("seeds", seeds)
    check_distinct("lrs", lrs)
    for model in models:
        check_choice("model", model, BOTTOMS)
    for lr in lrs:
        check_number("lrs", lr)


def check_distinct(name: str, values: Sequence[Any]) -> None:
    """At least one value, no two of which are printed alike: results are listed by what is printed."""
    if not values:
        raise ValueError(f"{name} must have at least one value, got none")
    printed = [f"{value:g}" if isinstance(value, float) else str(value) for value in values]
    if len(set(printed)) < len(printed):
        raise ValueError(f"{name} must differ as they are printed here; got {', '.join(printed)}")


def check_folder(out: Path) -> None:
    """Make the folder, and refuse one that cannot be written."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out):
            pass
    except OSError as error:
        raise ValueError(f"out must be a folder that can be written, got {out}: {error.strerror}") from error


def write(result: dict[str, Any], path: Path) -> None:
    path.write_text(json.dumps(result, indent=1, allow_nan=False) + "\n", encoding="utf-8")
