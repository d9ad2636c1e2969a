"""`same_values`: one model with the values of another."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.dict_utils import extract_matching_values, nested_values
from megatron.core.dist_checkpointing.mapping import apply_factories
from torch import Tensor, nn


def same_values(source: nn.Module, target: nn.Module) -> None:
    """Give a Megatron-Core model the values of another, by the keys of their checkpoints, without a file.

    Both are of one architecture in one layout, whatever their MoE layers are: Megatron's own, or fastmoe's.

    Raises:
        ValueError: one has what the other has not.
    """
    given, wanted = _tensors(source), _tensors(target)
    if given.keys() != wanted.keys():
        odd = sorted({key for key, _ in given.keys() ^ wanted.keys()})
        raise ValueError(f"the models must have the same parameters; only one of them has {', '.join(odd[:5])}")
    with torch.no_grad():
        for key, tensor in wanted.items():
            tensor.copy_(given[key])


def _tensors(model: Any) -> dict[tuple[str, tuple[int, ...]], Tensor]:
    """What a model holds, by key and place in the whole, as views of its parameters."""
    state = model.sharded_state_dict()
    apply_factories(state)
    found, _ = extract_matching_values(state, lambda value: isinstance(value, ShardedTensor))
    return {(one.key, one.global_offset): one.data.detach() for one in nested_values(found)}
