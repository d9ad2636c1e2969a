"""Initialise anew whatever can be."""

from torch import nn


def reset_where_possible(module: object) -> None:
    """Call `reset_parameters` of every part of a module that has one, inner parts first, so that the start a module
    gives its parts stays; anything but a module is left alone.
    """
    for part in reversed(list(module.modules())) if isinstance(module, nn.Module) else ():
        if callable(reset := getattr(part, "reset_parameters", None)):
            reset()
