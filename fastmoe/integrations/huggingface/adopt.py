"""Models of transformers after their feed-forward blocks were replaced: they get a class and a configuration that say
so, for what they save to be loaded as what it is.
"""

import copy
import logging

from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from fastmoe.integrations.huggingface.config import MoEConfig, config_class_for
from fastmoe.integrations.huggingface.describe import describe
from fastmoe.integrations.huggingface.model import MoEModel, finish, model_class_for
from fastmoe.integrations.huggingface.native import to_native
from fastmoe.integrations.huggingface.registry import register_models
from fastmoe.layer import MoE

logger = logging.getLogger("fastmoe")


def adopt(model: nn.Module, native: bool = False) -> nn.Module:
    """Every model of transformers in `model` that holds MoE layers becomes one of ours, in place.

    `native`: give transformers' own MoE model besides, a new one.

    Raises:
        ValueError: no native model that fits.
    """
    if native and not isinstance(model, PreTrainedModel):
        raise ValueError(f"to_native= is for a model of transformers itself, got {type(model).__name__}")
    made = to_native(model) if isinstance(model, PreTrainedModel) and native else model
    for owner in _outermost(model):
        if type(owner).config_class is None:
            logger.warning("moefy: %s has no config_class: what it saves cannot be loaded", type(owner).__name__)
            continue
        if not isinstance(owner, MoEModel):
            _adopt_one(owner, model)
        _describe_in_config(owner)
        finish(owner)
    return made


def adopt_inside(model: PreTrainedModel) -> None:
    """The models inside `model` too, for each may be called and saved by itself."""
    for inner in _with_layers(model):
        if inner is not model and not isinstance(inner, MoEModel) and type(inner).config_class is not None:
            _adopt_one(inner, model)
            if inner.config is not model.config:
                _describe_in_config(inner)


def _outermost(model: nn.Module) -> list[PreTrainedModel]:
    found: list[PreTrainedModel] = []
    inside: set[int] = set()
    for candidate in _with_layers(model):
        if id(candidate) not in inside:
            found.append(candidate)
            inside.update(id(module) for module in candidate.modules())
    return found


def _with_layers(model: nn.Module) -> list[PreTrainedModel]:
    """The models of transformers in `model` that hold MoE layers, outer ones first."""
    models = (module for module in model.modules() if isinstance(module, PreTrainedModel))
    return [module for module in models if any(isinstance(part, MoE) for part in module.modules())]


def _adopt_one(model: PreTrainedModel, root: nn.Module) -> None:
    """`root` is what `model` is in: configurations in it may hold that of `model`."""
    if not isinstance(model.config, MoEConfig):
        _replace_config(root, model.config, _moe_config(model.config))
    model.__class__ = model_class_for(type(model))
    register_models(type(model.config))


def _describe_in_config(model: PreTrainedModel) -> None:
    try:
        model.config.fastmoe = {"layers": describe(model)}
    except ValueError:
        model.config.fastmoe = {"layers": []}  # said again, with the reason, when it is saved


def _moe_config(dense: PretrainedConfig) -> PretrainedConfig:
    config = copy.copy(dense)
    config.__class__ = config_class_for(type(dense))
    for name, value in dict(vars(dense)).items():
        if not isinstance(value, PretrainedConfig):  # those are replaced one by one
            vars(config)[name] = copy.deepcopy(value)
    for name in ("model_type", "auto_map"):  # in a config from a file, of the dense class
        vars(config).pop(name, None)
    return config


def _replace_config(model: nn.Module, old: PretrainedConfig, new: PretrainedConfig) -> None:
    """`new` wherever a module, or another configuration, holds `old`."""
    for module in model.modules():
        for name, value in vars(module).items():
            if value is old:
                setattr(module, name, new)
            elif isinstance(value, PretrainedConfig):
                for key, inner in vars(value).items():
                    if inner is old:
                        setattr(value, key, new)
