"""Models of transformers after their feed-forward blocks were replaced: they get a class and a configuration that say
so, for what they save to be loaded as what it is.
"""

import logging

from torch import nn
from transformers import PreTrainedModel

from fastmoe.integrations.huggingface.model import MoEModel, describe_in_config, finish, make_moe, models_with_layers
from fastmoe.integrations.huggingface.native import to_native

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
            make_moe(owner, model)
        describe_in_config(owner)
        finish(owner)
    return made


def _outermost(model: nn.Module) -> list[PreTrainedModel]:
    found: list[PreTrainedModel] = []
    inside: set[int] = set()
    for candidate in models_with_layers(model):
        if id(candidate) not in inside:
            found.append(candidate)
            inside.update(id(module) for module in candidate.modules())
    return found
