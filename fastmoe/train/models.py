"""The language models that can be trained, by name, and what a token costs."""

from __future__ import annotations

import dataclasses
import typing
from dataclasses import fields
from typing import Any

from torch import nn

import fastmoe
from fastmoe._errors import unknown_name
from fastmoe.models import NAMED, GPTConfig, LSTMConfig, TransformerXLConfig, gpt, transformer_xl
from fastmoe.models.common import ExpertOptions
from fastmoe.models.named import CLASSES, Config, LanguageModel
from fastmoe.train.config import Arch, ModelConfig, MoEConfig
from fastmoe.train.options import convert

VOCAB_SIZE = 256
BLOCKS = (gpt.Block, transformer_xl.Block)
DEFAULTS = ModelConfig()
SHAPE = ("n_layer", "n_head", "d_model", "dropout", "bias")

CONFIGS: dict[Arch, type[Config]] = {"gpt": GPTConfig, "transformer_xl": TransformerXLConfig, "lstm": LSTMConfig}


def build_dense(shape: ModelConfig) -> LanguageModel:
    config = model_config(shape)
    return CLASSES[type(config)](config)


def model_config(shape: ModelConfig) -> Config:
    """The config of the model in `fastmoe.models`.

    Raises:
        ValueError: an option that this model does not have, that has a flag of its own, or that is of another type.
    """
    kind = CONFIGS[shape.arch]
    known = {field.name for field in fields(kind)} - {field.name for field in fields(ExpertOptions)}
    hints = typing.get_type_hints(kind)
    given: dict[str, Any] = {"vocab_size": VOCAB_SIZE, "d_hidden": shape.dense_hidden}
    if "block_size" in known:
        given["block_size"] = shape.block_size
    for name in SHAPE:
        value, default = getattr(shape, name), getattr(DEFAULTS, name)
        if name in known:
            given[name] = value
        elif value != default:
            raise ValueError(f"arch {shape.arch!r} has no {name}: expected it to be left at {default}; got {value}")
    for name, value in shape.model_options.items():
        if name not in known or name in given:
            raise unknown_name(f"model option of {shape.arch}", name, sorted(known - given.keys()))
        given[name] = convert(value, hints[name], f"model option {name}")
    return kind(**given)


def named_shape(name: str, segment: int | None = None, init_scale: float = 1.0) -> ModelConfig:
    """The flags for the dense model of a row of `fastmoe.models.NAMED`, but for its vocabulary: bytes here.

    Args:
        segment: block_size of a model whose config has none.
    """
    config = NAMED[name]
    (arch,) = (arch for arch, kind in CONFIGS.items() if type(config) is kind)
    given, default = dataclasses.asdict(config), dataclasses.asdict(CONFIGS[arch]())
    flags = {flag: given[flag] for flag in ("block_size", "d_hidden", *SHAPE) if flag in given}
    apart = {"vocab_size", *flags, *(field.name for field in fields(ExpertOptions))}
    options = {key: value for key, value in given.items() if key not in apart and value != default[key]}
    return ModelConfig(arch, **{"block_size": segment} | flags, init_scale=init_scale, model_options=options)


def named_experts(name: str) -> MoEConfig:
    config = NAMED[name]
    return MoEConfig(config.num_experts, config.top_k, config.expert_hidden, config.router, config.router_options or {})


def attended(shape: ModelConfig) -> float:
    """Positions that a query of attention sees on average, itself included."""
    if shape.arch == "lstm":
        return 0.0
    config = model_config(shape)
    memory = config.memory_length if isinstance(config, TransformerXLConfig) else 0
    return memory + (shape.block_size + 1) / 2


def train_flops_per_token(model: nn.Module, shape: ModelConfig) -> float:
    """`6 N + 12 n_layer d_model attended`: forward and backward of N active parameters, and of scores and sums.

    N is that of `fastmoe.summary`, embeddings included. Twins differ in their router alone. Of a Transformer-XL it
    leaves out a fifth, the same for both: products with distances, keys and values of the memory.
    """
    active = fastmoe.summary(model).active_params
    return 6 * active + 12 * shape.n_layer * shape.d_model * attended(shape)
