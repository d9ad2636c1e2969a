"""Soft dispatch: rows are weighted means of tokens, and tokens weighted means of rows."""

import torch
from torch import Tensor


def to_slots(x_TD: Tensor, dispatch_BSL: Tensor, num_experts: int) -> Tensor:
    """Each slot's mean of its sequence's tokens, sorted by expert, then sequence: `(E * B * p, D)`, L = E * p slots.

    Puigcerver et al. 2023 (2308.00951), equation 1.
    """
    num_sequences, length, num_slots = dispatch_BSL.shape
    x_BSD = x_TD.reshape(num_sequences, length, x_TD.shape[1])
    slots_BLD = torch.bmm(dispatch_BSL.transpose(1, 2).to(x_TD.dtype), x_BSD)
    slots_BEpD = slots_BLD.unflatten(1, (num_experts, num_slots // num_experts))
    return slots_BEpD.transpose(0, 1).reshape(num_sequences * num_slots, x_TD.shape[1])


def from_slots(rows_RO: Tensor, combine_BSL: Tensor, num_experts: int) -> Tensor:
    """Each token's mean of its sequence's slots, `(T, O)`, from rows sorted as by `to_slots`; equation 2."""
    num_sequences, length, num_slots = combine_BSL.shape
    width = rows_RO.shape[1]
    rows_EBpO = rows_RO.reshape(num_experts, num_sequences, num_slots // num_experts, width)
    slots_BLO = rows_EBpO.transpose(0, 1).reshape(num_sequences, num_slots, width)
    return torch.bmm(combine_BSL.to(rows_RO.dtype), slots_BLO).reshape(num_sequences * length, width)
