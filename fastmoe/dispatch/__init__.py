"""Dispatchers move rows to where their expert lives, and back."""

from fastmoe.dispatch.local import Dispatched, LocalDispatcher

__all__ = ["Dispatched", "LocalDispatcher"]
