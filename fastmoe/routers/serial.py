"""Tokens served one after another: each takes the best expert that still has room."""

import torch
from torch import Tensor

from fastmoe.routers.capacity import places_in_queues


def serve_in_turn(wants_TE: Tensor, room_E: Tensor) -> Tensor:
    """Each token's expert, int64 `(T,)`, -1 for none: the first token chooses, then the second, and so on.

    By deferred acceptance: all tokens ask for their best expert, each expert keeps the earliest that it has room for,
    and whoever comes later than its first refusal asks elsewhere. As all experts rank tokens alike this is the serial
    answer, after E rounds at most; each waits for the device.

    Args:
        wants_TE: how much a token wants an expert; -inf: not at all.
        room_E: int64, tokens that each expert takes.
    """
    num_tokens, num_experts = wants_TE.shape
    turn_T = torch.arange(num_tokens, device=wants_TE.device)
    room_E1 = torch.cat([room_E, room_E.new_tensor([num_tokens])])  # the last is for tokens that want no expert
    closes_E1 = torch.where(room_E1 > 0, num_tokens, 0)
    ids_T, late_T = torch.full_like(turn_T, num_experts), torch.zeros_like(turn_T, dtype=torch.bool)
    for _ in range(num_experts):
        open_TE = turn_T.unsqueeze(1) < closes_E1[:num_experts]
        best_T, ids_T = torch.where(open_TE, wants_TE, -torch.inf).max(dim=1)
        ids_T = torch.where(best_T > -torch.inf, ids_T, num_experts)
        places_T, _ = places_in_queues(ids_T, num_experts + 1)
        late_T = places_T >= room_E1[ids_T]
        if not bool(late_T.any()):
            break
        closes_E1 = closes_E1.scatter_reduce(0, torch.where(late_T, ids_T, num_experts), turn_T, "amin")
    return torch.where(late_T | (ids_T == num_experts), -1, ids_T)
