"""`to_native`: a model with `fastmoe.MoE` layers becomes transformers' own MoE model of the same function."""

import copy
import logging

import torch
import transformers
from torch import nn
from transformers import PreTrainedModel

from fastmoe.integrations.huggingface.native_family import FAMILIES, Family, config_of_native
from fastmoe.integrations.huggingface.native_layer import same_in_all
from fastmoe.integrations.huggingface.native_weights import class_beneath, give_weights
from fastmoe.layer import MoE
from fastmoe.model import moe_layers

logger = logging.getLogger("fastmoe")


def to_native(model: PreTrainedModel) -> PreTrainedModel:
    """The same function as a model of transformers' own MoE family, which needs no fastmoe to load.

    LLaMA and Mistral become Mixtral, Qwen2 becomes Qwen2-MoE, Qwen3 Qwen3-MoE, Granite GraniteMoE, OLMo2 FlexOlmo,
    with the same head. Outputs and gradients are those of `model` up to rounding; in half precision transformers also
    rounds the router's logits, which fastmoe keeps in float32.

    No memory is taken: the weights are those of `model`, laid out alike, so that training the one trains the other.
    Frozen weights, tied weights, dtype, device, mode and generation config are kept; hooks and gradient checkpointing
    are not.

    The balance loss becomes `router_aux_loss_coef = aux_loss_weight * layers / top_k`: transformers counts a token K
    times and takes one loss of the mean over all layers, where fastmoe sums a loss of each. Values and gradients agree
    where all layers have the same load. `output_router_logits` is set along with it, without which transformers' models
    train without their balance loss; the loss that they return then contains it, in evaluation too. Of the heads only
    `...ForCausalLM` has it.

    Args:
        model: a transformers model whose feed-forward blocks became `fastmoe.MoE` layers. It stays as it is.

    Raises:
        ValueError: transformers has no such MoE family or head; a layer or a setting that the family cannot express,
            by name.
    """
    dense_class, family = _family_of(model)
    devices = sorted({str(parameter.device) for parameter in model.parameters()})
    if len(devices) > 1:
        raise ValueError(f"the model's weights lie on several devices ({', '.join(devices)}): load it onto one")
    native_class = _native_class(dense_class, family)
    layers = _moe_blocks(model)
    layer = same_in_all(layers)
    dense_layers = [number for number, block in enumerate(_feed_forward_blocks(model)) if not isinstance(block, MoE)]
    config = config_of_native(model.config, dense_class, native_class, family, layer, dense_layers)
    config.output_router_logits = bool(layer.aux_loss_weight) and dense_class.__name__.endswith("ForCausalLM")
    if layer.top_k == 1 and layer.normalized:
        logger.warning("to_native: with top_k=1 the router of %s learns from its balance loss alone", family.native)
    attention = model.config._attn_implementation
    with torch.device("meta"):
        native = native_class._from_config(config, dtype=model.dtype, attn_implementation=attention)
    give_weights(native, model, layers, family)
    if model.can_generate():
        native.generation_config = copy.deepcopy(model.generation_config)
    return native.train(model.training)


def _family_of(model: PreTrainedModel) -> tuple[type[PreTrainedModel], Family]:
    """The transformers class that the model is of, and its row."""
    cls = class_beneath(model)
    if not issubclass(cls, PreTrainedModel) or getattr(transformers, cls.__name__, None) is not cls:
        raise ValueError(f"to_native takes a model of transformers' own classes, got {cls.__name__}")
    family = FAMILIES.get(cls.config_class.model_type)
    if family is None:
        pairs = ", ".join(f"{name} -> {row.native}" for name, row in FAMILIES.items())
        raise ValueError(f"transformers has no MoE family that fits {cls.config_class.model_type!r}; it has {pairs}")
    return cls, family


def _native_class(dense_class: type[PreTrainedModel], family: Family) -> type[PreTrainedModel]:
    name = family.native + dense_class.__name__.removeprefix(family.dense)
    native_class = getattr(transformers, name, None)
    if native_class is None:
        raise ValueError(f"transformers has {dense_class.__name__}, and no {name}")
    return native_class


def _feed_forward_blocks(model: PreTrainedModel) -> list[nn.Module]:
    return [layer.get_submodule("mlp") for layer in model.base_model.get_submodule("layers").children()]


def _moe_blocks(model: PreTrainedModel) -> dict[str, MoE]:
    """The MoE layers by name; `ValueError` if one stands elsewhere than in the place of a feed-forward block."""
    layers = moe_layers(model)
    if not layers:
        raise ValueError("the model holds no fastmoe.MoE layer: convert it first, by fastmoe.moefy(model, num_experts)")
    blocks = _feed_forward_blocks(model)
    for name, moe in layers.items():
        if moe not in blocks:
            raise ValueError(f"layer {name!r} does not stand in the place of a decoder layer's feed-forward block")
    return layers
