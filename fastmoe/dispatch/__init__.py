"""Dispatchers move rows to where their expert lives, and back."""

from fastmoe.dispatch.local import Dispatched, LocalDispatcher
from fastmoe.dispatch.soft import from_slots, to_slots

__all__ = ["Dispatched", "LocalDispatcher", "from_slots", "to_slots"]
