"""Serving tokens one after another, against the loop that does so."""

import pytest
import torch

from fastmoe.routers.serial import serve_in_turn


def one_after_another(wants_TE, room_E):
    room, ids = list(room_E), []
    for row in wants_TE:
        open_to_it = [e for e, want in enumerate(row) if room[e] > 0 and want > -torch.inf]
        ids.append(max(open_to_it, key=lambda e: row[e], default=-1))
        if ids[-1] >= 0:
            room[ids[-1]] -= 1
    return ids


@pytest.mark.parametrize("alike", [False, True])
@pytest.mark.parametrize("num_experts", [1, 2, 7])
@pytest.mark.parametrize("num_tokens", [0, 1, 30])
def test_is_one_after_another(num_tokens, num_experts, alike):
    for largest_room in (0, 1, 3, 6, 40):
        for refused in (0.0, 0.4):
            wants_TE = torch.randn(num_tokens, num_experts, dtype=torch.float64)
            if alike:
                wants_TE = wants_TE[:1].expand(num_tokens, -1)
            wants_TE = wants_TE.masked_fill(torch.rand(num_tokens, num_experts) < refused, -torch.inf)
            room_E = torch.randint(largest_room + 1, (num_experts,))
            expected = one_after_another(wants_TE.tolist(), room_E.tolist())
            assert serve_in_turn(wants_TE, room_E).tolist() == expected
