"""What a user gives to the language models: fields of their configs, tokens, state."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastmoe._errors import check_int, check_number

IDS = (torch.int64, torch.int32)


def check_sizes(config: object, minimum: int, *names: str) -> None:
    """Each field is a whole number of at least `minimum`, or None where that is its default."""
    for name in names:
        if not _left_out(config, name):
            check_int(name, getattr(config, name), minimum)


def check_dropouts(config: object, *names: str) -> None:
    """Each field is a number from 0 to 1, or None where that is its default."""
    for name in names:
        if not _left_out(config, name) and check_number(name, getattr(config, name)) > 1:
            raise ValueError(f"{name} must be at most 1, got {getattr(config, name)}")


def _left_out(config: object, name: str) -> bool:
    return getattr(config, name) is None and getattr(type(config), name) is None


def check_tokens(tokens_BS: Tensor, targets_BS: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    """Both as int64."""
    if not _are_ids(tokens_BS) or tokens_BS.dim() != 2 or not tokens_BS.shape[1]:
        raise ValueError(f"tokens must be int64 or int32 of shape (B, S), S at least 1; got {described(tokens_BS)}")
    if targets_BS is None:
        return tokens_BS.long(), None
    if not _are_ids(targets_BS) or targets_BS.shape != tokens_BS.shape:
        shape = tuple(tokens_BS.shape)
        raise ValueError(f"targets must be int64 or int32 of shape {shape}; got {described(targets_BS)}")
    return tokens_BS.long(), targets_BS.long()


def _are_ids(value: object) -> bool:
    return isinstance(value, Tensor) and value.dtype in IDS


def check_state(name: str, state: Tensor, shape: tuple[int | str, ...], dtype: torch.dtype) -> Tensor:
    """A state of earlier segments in this dtype, without graph; a letter in `shape` stands for any length."""
    fits = isinstance(state, Tensor) and state.is_floating_point() and state.dim() == len(shape)
    if not fits or any(isinstance(n, int) and n != got for n, got in zip(shape, state.shape, strict=True)):
        wanted = ", ".join(map(str, shape))
        raise ValueError(f"{name} must be floating point of shape ({wanted}); got {described(state)}")
    return state.detach().to(dtype)


def described(value: Any) -> str:
    """The dtype and shape of a tensor or array, the type of anything else."""
    if not hasattr(value, "shape"):
        return f"a {type(value).__name__}"
    return f"{str(value.dtype).removeprefix('torch.')} of shape {tuple(value.shape)}"
