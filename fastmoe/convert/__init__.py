"""Turning dense models into MoE models."""

from fastmoe.convert.replace import moefy
from fastmoe.convert.patterns import PATTERNS, Pattern

__all__ = ["PATTERNS", "Pattern", "moefy"]
