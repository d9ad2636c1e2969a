"""Dispatchers move rows to where their expert lives, and back."""

from fastmoe.dispatch.all_to_all import AllToAllDispatcher
from fastmoe.dispatch.local import Compute, LocalDispatcher, RoutedRows
from fastmoe.dispatch.slices import Slices
from fastmoe.dispatch.soft import from_slots, to_slots
from fastmoe.dispatch.spread import Spread

__all__ = [
    "AllToAllDispatcher",
    "Compute",
    "LocalDispatcher",
    "RoutedRows",
    "Slices",
    "Spread",
    "from_slots",
    "to_slots",
]
