"""Flat, readable reference models."""

from fastmoe.models.gpt import GPT, GPTConfig

__all__ = ["GPT", "GPTConfig"]
