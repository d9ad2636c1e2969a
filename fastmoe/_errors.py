"""Errors in the user's words."""

import difflib
from collections.abc import Iterable


def unknown_name(kind: str, got: object, known: Iterable[str]) -> ValueError:
    """A `ValueError` that names the nearest known name and lists them all."""
    names = sorted(known)
    near = difflib.get_close_matches(str(got), names, n=1, cutoff=0.5)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    return ValueError(f"unknown {kind} {got!r}.{hint} Known: {', '.join(names)}")


def check_int(name: str, value: object, minimum: int) -> int:
    """`value` if it is a whole number of at least `minimum`, else a `ValueError`."""
    if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
        raise ValueError(f"{name} must be a whole number >= {minimum}, got {value!r}")
    return value
