"""Turning dense models into MoE models."""

from fastmoe.convert.patterns import PATTERNS, Pattern
from fastmoe.convert.replace import moefy

__all__ = ["PATTERNS", "Pattern", "moefy"]
