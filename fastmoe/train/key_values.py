"""Flags of the form `--flag KEY=VALUE ...`, which become a dict."""

from __future__ import annotations

import tomllib
from typing import Any

import tyro

PYTHON_NAMES = {"None": None, "True": True, "False": False}


def read_value(text: str) -> Any:
    """A value as TOML has it: a number, true, false, a list, a quoted text; or None; anything else is a text."""
    if text in PYTHON_NAMES:
        return PYTHON_NAMES[text]
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def read_key_values(texts: list[str]) -> dict[str, Any]:
    for text in texts:
        if "=" not in text:
            raise ValueError(f"expected KEY=VALUE, got {text}")
    return {key: read_value(value) for key, _, value in (text.partition("=") for text in texts)}


KEY_VALUES = tyro.constructors.PrimitiveConstructorSpec(
    nargs="*",
    metavar="[KEY=VALUE ...]",
    instance_from_str=read_key_values,
    is_instance=lambda value: isinstance(value, dict),
    str_from_instance=lambda options: [f"{key}={value}" for key, value in options.items()],
)
