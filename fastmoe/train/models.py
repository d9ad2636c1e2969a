"""The language models that can be trained, by name, and what a token costs."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from torch import nn

import fastmoe
from fastmoe._errors import unknown_name
from fastmoe.models import gpt, lstm, transformer_xl
from fastmoe.train.config import Arch, ModelConfig

VOCAB_SIZE = 256
BLOCKS = (gpt.Block, transformer_xl.Block)
DEFAULTS = ModelConfig()
SHAPE = ("n_layer", "n_head", "d_model", "dropout", "bias")

LanguageModel = gpt.GPT | transformer_xl.TransformerXL | lstm.LSTMLanguageModel


@dataclass(frozen=True)
class Entry:
    model: type[Any]
    config: type[Any]


MODELS: dict[Arch, Entry] = {
    "gpt": Entry(gpt.GPT, gpt.GPTConfig),
    "transformer_xl": Entry(transformer_xl.TransformerXL, transformer_xl.TransformerXLConfig),
    "lstm": Entry(lstm.LSTMLanguageModel, lstm.LSTMConfig),
}


def build_dense(shape: ModelConfig) -> LanguageModel:
    return MODELS[shape.arch].model(model_config(shape))


def model_config(shape: ModelConfig) -> Any:
    """The config of the model in `fastmoe.models`.

    Raises:
        ValueError: an option that this model does not have, or that has a name of its own.
    """
    known = {field.name for field in fields(MODELS[shape.arch].config)}
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
        given[name] = value
    return MODELS[shape.arch].config(**given)


def attended(shape: ModelConfig) -> float:
    """Positions that a query of attention sees on average, itself included."""
    if shape.arch == "lstm":
        return 0.0
    memory = model_config(shape).memory_length if shape.arch == "transformer_xl" else 0
    return memory + (shape.block_size + 1) / 2


def train_flops_per_token(model: nn.Module, shape: ModelConfig) -> float:
    """`6 N + 12 n_layer d_model attended`: forward and backward of N active parameters, and of scores and sums.

    N is that of `fastmoe.summary`, embeddings included. Twins differ in their router alone.
    """
    active = fastmoe.summary(model).active_params
    return 6 * active + 12 * shape.n_layer * shape.d_model * attended(shape)
