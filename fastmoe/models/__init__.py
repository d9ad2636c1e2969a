"""Flat, readable reference models."""

from fastmoe.models.common import language_model_step
from fastmoe.models.gpt import GPT, GPTConfig
from fastmoe.models.transformer_xl import TransformerXL, TransformerXLConfig

__all__ = ["GPT", "GPTConfig", "TransformerXL", "TransformerXLConfig", "language_model_step"]
