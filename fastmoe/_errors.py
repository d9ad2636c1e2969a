"""Errors in the user's words."""

import difflib
import math
from collections.abc import Iterable
from numbers import Integral, Real


def unknown_name(kind: str, got: object, known: Iterable[str]) -> ValueError:
    """A `ValueError` that names the nearest known name and lists them all."""
    names = sorted(known)
    near = difflib.get_close_matches(str(got), names, n=1, cutoff=0.5)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    return ValueError(f"unknown {kind} {got!r}.{hint} Known: {', '.join(names)}")


def check_int(name: str, value: object, minimum: int) -> int:
    """`value` if it is a whole number of at least `minimum`, else a `ValueError`."""
    if isinstance(value, bool) or not isinstance(value, Integral) or value < minimum:
        raise ValueError(f"{name} must be a whole number >= {minimum}, got {value!r}")
    return int(value)


def check_number(name: str, value: object, minimum: float = 0.0) -> float:
    """`value` as a float if it is a finite number of at least `minimum`, else a `ValueError`."""
    if isinstance(value, bool) or not isinstance(value, Real) or not minimum <= float(value) < math.inf:
        raise ValueError(f"{name} must be a finite number >= {minimum:g}, got {value!r}")
    return float(value)


def check_choice(name: str, value: object, known: Iterable[str]) -> str:
    """`value` if it is one of the known names, else a `ValueError`."""
    known = list(known)
    if value not in known:
        raise unknown_name(name, value, known)
    return str(value)
