"""Configuration classes of MoE models that were dense: a model type of their own, made from the dense one's."""

import copy
import dataclasses
import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from threading import RLock
from typing import Any

from torch import nn
from transformers import CONFIG_MAPPING, PretrainedConfig

PREFIX = "fastmoe_"
CLASS_PREFIX = "FastMoE"
GUARD = "in a fastmoe model: load it by an Auto class, after `import fastmoe.integrations.huggingface`"
WIDTHS = ("intermediate_size", "ffn_dim", "d_ff", "n_inner", "encoder_ffn_dim", "hidden_dim")

made: dict[type, type] = {}
lock = RLock()


class MoEConfig:
    """Mixed into a dense configuration class.

    Attributes:
        fastmoe: `{"layers": [...]}`, the MoE layers as `fastmoe.integrations.huggingface.describe` gives them.
    """

    model_type: str
    fastmoe: dict[str, Any]
    use: Callable[[type], None]

    def to_json_file(self: Any, json_file_path: str | Path, use_diff: bool = True) -> None:
        """Write the file; one number in it is none, for a dense class to fail on it.

        It would load the file, warn, and go on with feed-forward weights drawn anew.
        """
        content = guard(self, json.loads(self.to_json_string(use_diff)))
        Path(json_file_path).write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        reduced: Any = super().__reduce_ex__(protocol)
        made_by, (cls, *more), *rest = reduced
        return _remade, (made_by, dense_config_class(cls), *more), *rest


def config_class_for(dense: Any) -> Any:
    """The configuration class of MoE models that were made from models with a `dense` one."""

    def initialise(self: Any, *args: Any, **kwargs: Any) -> None:
        kwargs = unguard(kwargs)
        fastmoe = kwargs.pop("fastmoe", None) or {"layers": []}
        dense.__init__(self, *args, **kwargs)
        self.fastmoe = copy.deepcopy(fastmoe)
        self.use(type(self))

    with lock:
        if dense not in made:
            body = {
                "model_type": PREFIX + dense.model_type,
                "_auto_class": None,
                "__module__": __name__,
                "__init__": initialise,
            }
            made[dense] = type(CLASS_PREFIX + dense.__name__, (MoEConfig, dense), body)
        return made[dense]


def guard(config: Any, content: dict[str, Any]) -> dict[str, Any]:
    """What a file holds of a MoE configuration: of it, and of each one inside it, one number is a text."""
    inside = {key: value for key, value in vars(config).items() if isinstance(value, MoEConfig)}
    content |= {key: guard(value, content[key]) for key, value in inside.items() if isinstance(content.get(key), dict)}
    name = guarded_field(dense_config_class(type(config)))
    if name is None:
        return content
    value = content[name] if name in content else getattr(config, name)
    return content | {name: GUARD, "fastmoe": config.fastmoe | {"guarded": {name: value}}}


def unguard(content: dict[str, Any]) -> dict[str, Any]:
    """The reverse of `guard`, of what is guarded."""
    content = {key: unguard(value) if isinstance(value, dict) else value for key, value in content.items()}
    fastmoe = content.get("fastmoe")
    if isinstance(fastmoe, dict):
        for name, value in fastmoe.pop("guarded", {}).items():
            if content.get(name) == GUARD:
                content[name] = value
    return content


@cache
def guarded_field(dense: Any) -> str | None:
    """A field of a dense configuration class, of its own, that takes no text: the width of its blocks if it can be.

    None for a class that holds other configurations alone, which are guarded themselves.
    """
    common = {field.name for field in dataclasses.fields(PretrainedConfig)} | set(dense.sub_configs)
    own = [field.name for field in dataclasses.fields(dense) if field.name not in common]
    for name in sorted(own, key=lambda name: name not in WIDTHS):
        try:
            dense(**{name: GUARD})
        except Exception:
            return name
    return None


def dense_config_class(config_class: Any) -> Any:
    """The class that a MoE configuration class was made from."""
    return next(base for base in config_class.__mro__[1:] if base is not MoEConfig)


def _remade(made_by: Any, dense: Any, *more: Any) -> Any:
    return made_by(config_class_for(dense), *more)


class ConfigClasses(dict[str, type[PretrainedConfig]]):
    """Configuration classes by model type, those of MoE models made when they are asked for.

    It takes the place of the dictionary in which transformers keeps registered ones, as making one for each of its
    several hundred types would import them all.
    """

    def __contains__(self, key: object) -> bool:
        if super().__contains__(key):
            return True
        return isinstance(key, str) and key.startswith(PREFIX) and key.removeprefix(PREFIX) in CONFIG_MAPPING

    def __missing__(self, key: str) -> type[PretrainedConfig]:
        self[key] = config_class_for(CONFIG_MAPPING[key.removeprefix(PREFIX)])
        return self[key]


def register(use: Callable[[type], None]) -> None:
    """Make `fastmoe_<type>` known to `AutoConfig` for every model type of transformers.

    `use` is called with a configuration class when there is one of its configurations.
    """
    MoEConfig.use = staticmethod(use)
    if not isinstance(CONFIG_MAPPING._extra_content, ConfigClasses):
        CONFIG_MAPPING._extra_content = ConfigClasses(CONFIG_MAPPING._extra_content)


def moe_config(dense: PretrainedConfig) -> PretrainedConfig:
    """A MoE configuration with what a dense one has."""
    config = copy.copy(dense)
    config.__class__ = config_class_for(type(dense))
    for name, value in dict(vars(dense)).items():
        if not isinstance(value, PretrainedConfig):  # those are replaced one by one
            vars(config)[name] = copy.deepcopy(value)
    for name in ("model_type", "auto_map"):  # in a config from a file, of the dense class
        vars(config).pop(name, None)
    return config


def replace_config(root: nn.Module, model: nn.Module, new: PretrainedConfig) -> None:
    """`new` for the configuration of `model`, wherever it, or a configuration of what it is in, holds that."""
    old: Any = model.config
    parts = set(model.modules())
    for module in root.modules():
        around = model in set(module.modules())
        for name, value in list(vars(module).items()):
            if value is old and (module in parts or around):
                setattr(module, name, new)
            elif isinstance(value, PretrainedConfig) and around:
                for key, inner in list(vars(value).items()):
                    if inner is old:
                        setattr(value, key, new)
