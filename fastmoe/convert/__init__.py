"""Turning dense models into MoE models."""

from fastmoe.convert.patterns import PATTERNS, Pattern
from fastmoe.convert.recipe import DropoutMoE
from fastmoe.convert.replace import moefy
from fastmoe.convert.split import SPLIT_PATTERNS, Absorbed, SplitPattern, absorbed_beside

__all__ = [
    "PATTERNS",
    "SPLIT_PATTERNS",
    "Absorbed",
    "DropoutMoE",
    "Pattern",
    "SplitPattern",
    "absorbed_beside",
    "moefy",
]
