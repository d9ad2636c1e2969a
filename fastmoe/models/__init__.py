"""Flat, readable reference models."""

from fastmoe.models.common import language_model_step
from fastmoe.models.evaluate import evaluate_bits_per_byte, evaluate_nats
from fastmoe.models.gpt import GPT, GPTConfig
from fastmoe.models.lstm import LSTMConfig, LSTMLanguageModel
from fastmoe.models.mmoe import MultiTask, MultiTaskConfig
from fastmoe.models.named import NAMED, build, named_config
from fastmoe.models.transformer_xl import TransformerXL, TransformerXLConfig

__all__ = [
    "GPT",
    "NAMED",
    "GPTConfig",
    "LSTMConfig",
    "LSTMLanguageModel",
    "MultiTask",
    "MultiTaskConfig",
    "TransformerXL",
    "TransformerXLConfig",
    "build",
    "evaluate_bits_per_byte",
    "evaluate_nats",
    "language_model_step",
    "named_config",
]
