"""`SwipeGate`: whoever finds a worker full goes to another one."""

import torch
from torch import Tensor

from fastmoe.routers.capacity import places_in_queues
from fmoe.gates.naive_gate import NaiveGate


class SwipeGate(NaiveGate):
    """The K best experts; in training each worker gets no more rows than it sends, T * K for its T tokens.

    First all tokens send their first choice, then their second, and so on. Rows that find their worker full go, in the
    order of workers, to those with room: choice k to their expert k modulo num_expert. Nothing is dropped; a token may
    go to one expert twice. Weights as of `NaiveGate`, of the experts that a token got. No balance loss.

    Args:
        d_model, num_expert, world_size, top_k, gate_bias, top1_weight_one: see `NaiveGate`.
    """

    def forward(self, inp: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        """The experts got and their weights, both `(T, K)`."""
        logits_TE = self.gate(inp)
        expert_ids_TK = logits_TE.topk(self.top_k, dim=1).indices
        if self.training:
            room = torch.tensor(expert_ids_TK.numel())
            got = []
            for k, wanted_T in enumerate(expert_ids_TK.unbind(1)):
                got_T, room = self.swipe_once(wanted_T, room, k % self.num_expert)
                got.append(got_T)
            expert_ids_TK = torch.stack(got, dim=1)
        return expert_ids_TK, self.weights(logits_TE, expert_ids_TK)

    def swipe_once(self, idx: Tensor, capacity: Tensor, bias: int) -> tuple[Tensor, Tensor]:
        """One expert for each token.

        Args:
            idx: int64 `(T,)`, the experts wanted.
            capacity: int64 scalar, how many rows this worker takes.
            bias: which of its experts a worker gives those that come from elsewhere.

        Returns:
            The experts got, int64 `(T,)`, and the capacity that is left.
        """
        processes = self.sharers()
        wanted_T = idx // self.num_expert
        place_T, counts_P = places_in_queues(wanted_T, self.world_size)
        asked_PP = processes.gather(counts_P).cpu().view(-1, self.world_size)
        room_P = processes.gather(capacity.to(idx.device)).cpu().reshape(-1).expand(self.world_size)
        served_PP, moved_PP, left_P = share_out(asked_PP, room_P)
        served_P, moved_P = (counts[processes.rank].to(idx.device) for counts in (served_PP, moved_PP))
        moved_T = place_T >= served_P[wanted_T]
        workers_P = torch.arange(self.world_size, device=idx.device)
        got_T = idx.clone()
        got_T[moved_T] = workers_P.repeat_interleave(moved_P) * self.num_expert + bias
        return got_T, left_P[processes.rank].to(capacity.device)


def share_out(asked_PP: Tensor, room_P: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What workers get of each other's room.

    Args:
        asked_PP: int64, how many rows each worker (first index) wants to send to each one.
        room_P: int64, how many rows each takes; enough for all together.

    Returns:
        How many of those are served, lower ranks first, `(P, P)`; where the others of each worker go, lower ranks
        first, `(P, P)`; and the room that is left, `(P,)`.
    """
    ahead_PP = asked_PP.cumsum(0) - asked_PP
    served_PP = (room_P - ahead_PP).clamp(min=0).minimum(asked_PP)
    room_P = room_P - served_PP.sum(0)
    refused_P = (asked_PP - served_PP).sum(1)
    # Refused rows and free places stand in two lines, each by rank; a worker sends where its stretch meets another's.
    rows_end_P1, room_end_P = refused_P.cumsum(0).unsqueeze(1), room_P.cumsum(0)
    ends_PP = rows_end_P1.minimum(room_end_P)
    starts_PP = (rows_end_P1 - refused_P.unsqueeze(1)).maximum(room_end_P - room_P)
    moved_PP = (ends_PP - starts_PP).clamp(min=0)
    return served_PP, moved_PP, room_P - moved_PP.sum(0)
