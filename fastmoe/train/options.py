"""Where a `TrainConfig` comes from: a preset, then a TOML file, then flags, each over the one before."""

from __future__ import annotations

import tomllib
import types
import typing
from collections.abc import Mapping
from dataclasses import asdict, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeVar, Union

from fastmoe._errors import unknown_name
from fastmoe.train.config import DataConfig, ModelConfig, MoEConfig, OptimConfig, RunConfig, TrainConfig

Section = TypeVar("Section")

PRESETS: dict[str, TrainConfig] = {
    "small": TrainConfig(),
    "demo": TrainConfig(
        mode="compare",
        model=ModelConfig(block_size=128, n_layer=4, n_head=4, d_model=128),
        moe=MoEConfig(num_experts=8, top_k=2),
        data=DataConfig(eval_sequences=128),
        optim=OptimConfig(steps=1200, batch_size=8, lr=3e-3, min_lr=3e-4, warmup_steps=60),
        run=RunConfig(out=Path("runs/demo"), eval_every=50, checkpoint_every=300, keep_checkpoints=1),
    ),
}


def preset(name: str) -> TrainConfig:
    if name not in PRESETS:
        raise unknown_name("preset", name, PRESETS)
    return PRESETS[name]


def read_toml(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ValueError(f"no such config file: {path}")
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"{path} is not valid TOML: {error}") from error


def merge(config: Section, values: Mapping[str, Any], where: str = "config") -> Section:
    """`config` with `values`, as TOML gives them, in place of its fields; sections are merged, not replaced.

    Raises:
        ValueError: an unknown key (with the nearest known one) or a value of another type.
    """
    hints = typing.get_type_hints(type(config))
    known = {field.name: getattr(config, field.name) for field in fields(config)}  # type: ignore[arg-type]
    changes: dict[str, Any] = {}
    for key, value in values.items():
        if key not in known:
            raise unknown_name(f"key in {where}", key, known)
        if is_dataclass(known[key]):
            if not isinstance(value, Mapping):
                raise ValueError(f"{where}: {key} is a section; write its keys under [{key}]")
            changes[key] = merge(known[key], value, f"{where} [{key}]")
        else:
            changes[key] = convert(value, hints[key], f"{where}: {key}")
            if key == "model_options" and values.get("arch", known["arch"]) == known["arch"]:
                changes[key] = known[key] | changes[key]
    return replace(config, **changes)  # type: ignore[type-var]


def convert(value: object, hint: Any, where: str) -> object:
    """`value`, from TOML or a checkpoint, as the type `hint`."""
    origin, options = typing.get_origin(hint), typing.get_args(hint)
    if origin in (Union, types.UnionType):
        return None if value is None else convert(value, options[0], where)
    if origin is dict:
        if not isinstance(value, Mapping):
            raise ValueError(f"{where} must be a table; got {value!r}")
        return dict(value)
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise ValueError(f"{where} must be a list; got {value!r}")
        return tuple(convert(item, options[0], where) for item in value)
    if origin is Literal:
        if value not in options:
            raise unknown_name(f"value of {where}", value, options)
        return value
    if hint is Path and isinstance(value, str):
        return Path(value)
    if hint is float and type(value) is int:
        return float(value)
    if type(value) is not hint:
        raise ValueError(f"{where} must be {hint.__name__}; got {value!r}")
    return value


def to_plain(config: TrainConfig) -> dict[str, Any]:
    """Nested dicts of plain values, which `merge` reads back."""
    plain = asdict(config)
    for name in ("path", "valid"):
        plain["data"][name] = None if plain["data"][name] is None else str(plain["data"][name])
    plain["run"]["out"] = str(config.run.out)
    return plain
