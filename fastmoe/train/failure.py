"""Errors that say where in a run they happened."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class RunError(Exception):
    """The run cannot go on; the message names the model and the step, and the layer where the cause does."""


@contextmanager
def during(what: str) -> Iterator[None]:
    """What goes wrong inside becomes a `RunError` that says during what."""
    try:
        yield
    except (RuntimeError, OSError) as error:
        raise RunError(f"{what}: {error}") from error
