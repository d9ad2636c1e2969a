"""For gates of one's own."""

import torch
from torch import Tensor

from fastmoe.routers.capacity import places_in_queues
from fmoe.functions import count_by_gate, get_moe_group
from fmoe.passage import swap_counts
from fmoe.workers import workers


def limit_by_capacity(
    topk_idx: Tensor, num_expert: int, world_size: int, capacity: int | Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Choices of which each expert takes so many of those that all workers send, lower ranks and earlier ones first.

    What takes part is the group of the last `fmoe.functions.ensure_comm`, which a layer calls before its gate.

    Args:
        topk_idx: int64, the expert of each choice, -1 for none. Any shape.
        num_expert: e, experts in each worker.
        world_size: P, workers.
        capacity: of each expert here; a number or `(e,)`.

    Returns:
        How many rows of this worker each expert takes, int64 `(P * e,)`; how many the experts here take from each
        worker, int64 `(P * e,)`; and `topk_idx` with -1 for the other choices.

    Raises:
        ValueError: on a CPU an expert that is not there; a group of another size.
    """
    with torch.no_grad():
        _, sent_E, came = count_by_gate(topk_idx, num_expert, world_size, require_pos=False)
        came_Pe = came.view(world_size, num_expert)
        room_Pe = torch.as_tensor(capacity, device=came.device).long() - (came_Pe.cumsum(0) - came_Pe)
        taken = room_Pe.clamp(min=0).minimum(came_Pe).view(-1)
        served_E = swap_counts(taken, num_expert, workers(world_size, get_moe_group()))
        no_one = len(sent_E)
        queues_N = topk_idx.reshape(-1).masked_fill(topk_idx.reshape(-1) < 0, no_one)
        places_N, _ = places_in_queues(queues_N, no_one + 1)
        kept_N = places_N < torch.cat([served_E, served_E.new_zeros(1)])[queues_N]
        return served_E, taken, topk_idx.masked_fill(~kept_N.view(topk_idx.shape), -1)
