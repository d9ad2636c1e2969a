"""Configuration classes of MoE models that were dense: a model type of their own, made from the dense one's."""

import copy
import dataclasses
import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

from transformers import CONFIG_MAPPING, PretrainedConfig

PREFIX = "fastmoe_"
CLASS_PREFIX = "FastMoE"
DENSE_WIDTHS = ("intermediate_size", "ffn_dim", "d_ff", "n_inner", "encoder_ffn_dim", "decoder_ffn_dim")
GUARD = "a fastmoe model: import fastmoe.integrations.huggingface, and load it by an Auto class"


class MoEConfig:
    """Mixed into a dense configuration class.

    Attributes:
        fastmoe: `{"layers": [...]}`, the MoE layers as `fastmoe.integrations.huggingface.describe` gives them.
    """

    model_type: str
    fastmoe: dict[str, Any]

    def to_json_file(self: Any, json_file_path: str | Path, use_diff: bool = True) -> None:
        """Write the file; the width of dense blocks stands in it so that a dense class fails on it.

        A dense class would load the file, warn, and go on with feed-forward weights drawn anew.
        """
        content = json.loads(self.to_json_string(use_diff))
        widths = {name: getattr(self, name) for name in self._guarded()}
        content |= dict.fromkeys(widths, GUARD) | {"fastmoe": content["fastmoe"] | {"dense_widths": widths}}
        Path(json_file_path).write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")

    @classmethod
    def _guarded(cls: Any) -> list[str]:
        fields = {field.name for field in dataclasses.fields(cls)}
        return [name for name in DENSE_WIDTHS if name in fields]


def _make_config_class(dense: Any) -> type[PretrainedConfig]:
    """The configuration class of MoE models that were made from models with a `dense` one."""

    def initialise(self: Any, *args: Any, **kwargs: Any) -> None:
        fastmoe = copy.deepcopy(kwargs.pop("fastmoe", None) or {"layers": []})
        for name, value in fastmoe.pop("dense_widths", {}).items():
            if kwargs.get(name) == GUARD:
                kwargs[name] = value
        dense.__init__(self, *args, **kwargs)
        self.fastmoe = fastmoe
        _register_models(type(self))

    body = {"model_type": PREFIX + dense.model_type, "__module__": __name__, "__init__": initialise}
    return type(CLASS_PREFIX + dense.__name__, (MoEConfig, dense), body)


config_class_for: Callable[[Any], type[PretrainedConfig]] = cache(_make_config_class)


def dense_config_class(config_class: Any) -> type[PretrainedConfig]:
    """The class that a MoE configuration class was made from."""
    return next(base for base in config_class.__mro__[1:] if base is not MoEConfig)


class ConfigClasses(dict[str, type[PretrainedConfig]]):
    """Configuration classes by model type, those of MoE models made when they are asked for.

    It takes the place of the dictionary in which transformers keeps registered ones, as making one for each of its
    several hundred types would import them all.
    """

    def __contains__(self, key: object) -> bool:
        return super().__contains__(key) or (
            isinstance(key, str) and key.startswith(PREFIX) and key.removeprefix(PREFIX) in CONFIG_MAPPING._mapping
        )

    def __missing__(self, key: str) -> type[PretrainedConfig]:
        self[key] = config_class_for(CONFIG_MAPPING[key.removeprefix(PREFIX)])
        return self[key]


def register() -> None:
    """Make `fastmoe_<type>` known to `AutoConfig` for every model type of transformers."""
    if not isinstance(CONFIG_MAPPING._extra_content, ConfigClasses):
        CONFIG_MAPPING._extra_content = ConfigClasses(CONFIG_MAPPING._extra_content)


def _register_models(config_class: type[PretrainedConfig]) -> None:
    from fastmoe.integrations.huggingface.model import register_models

    register_models(config_class)


def __getattr__(name: str) -> Any:
    """`FastMoE<Config>`, for pickle."""
    import transformers

    dense = getattr(transformers, name.removeprefix(CLASS_PREFIX), None) if name.startswith(CLASS_PREFIX) else None
    if dense is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return config_class_for(dense)
