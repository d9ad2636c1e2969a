"""Models of transformers after their feed-forward blocks were replaced: they get a class and a configuration that say
so, for what they save to be loaded as what it is.
"""

import copy
from collections.abc import Iterator

from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from fastmoe.integrations.huggingface.config import config_class_for
from fastmoe.integrations.huggingface.describe import describe
from fastmoe.integrations.huggingface.model import MoEModel, finish, model_class_for, register_models
from fastmoe.integrations.huggingface.native import to_native
from fastmoe.layer import MoE


def adopt(model: nn.Module, native: bool = False) -> nn.Module:
    """Every model of transformers in `model` that holds MoE layers becomes one of ours, in place.

    `native`: give transformers' own MoE model instead, a new one.
    """
    if native:
        if not isinstance(model, PreTrainedModel):
            raise ValueError(f"to_native= is for a model of transformers itself, got {type(model).__name__}")
        return to_native(model)
    for owner in dict.fromkeys(_owners(model)):
        if not isinstance(owner, MoEModel):
            config = _moe_config(owner.config)
            _replace_config(model, owner.config, config)
            owner.__class__ = model_class_for(type(owner))
            register_models(type(config))
        try:
            owner.config.fastmoe = {"layers": describe(owner.base_model)}
        except ValueError:
            owner.config.fastmoe = {"layers": []}  # said again, with the reason, when it is saved
        finish(owner)
    return model


def _owners(module: nn.Module, above: PreTrainedModel | None = None) -> Iterator[PreTrainedModel]:
    """The models whose configurations speak for MoE layers: of those around a layer the innermost, or one around that
    which is of the same model type.
    """
    if isinstance(module, PreTrainedModel) and (above is None or above.config.model_type != module.config.model_type):
        above = module
    direct = False
    for child in module.children():
        if isinstance(child, MoE):
            direct = True
        else:
            yield from _owners(child, above)
    if direct and above is not None:
        yield above


def _moe_config(dense: PretrainedConfig) -> PretrainedConfig:
    config = copy.deepcopy(dense)
    config.__class__ = config_class_for(type(dense))
    vars(config).pop("model_type", None)  # a config from a file holds its class's again
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
