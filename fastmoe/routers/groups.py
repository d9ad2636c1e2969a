"""Group-limited selection: a token's experts come from few groups, as where a group lives on one machine."""

import torch
from torch import Tensor

from fastmoe._errors import check_int


def check_groups(num_groups: int, top_groups: int, num_experts: int, top_k: int) -> None:
    """Raise `ValueError` unless the best `top_groups` of `num_groups` equal groups hold at least K experts."""
    check_int("num_groups", num_groups, 1)
    check_int("top_groups", top_groups, 1)
    if num_experts % num_groups or top_groups > num_groups:
        raise ValueError(
            f"num_groups must divide num_experts={num_experts} and be at least top_groups; "
            f"got num_groups={num_groups}, top_groups={top_groups}"
        )
    if top_groups * (num_experts // num_groups) < top_k:
        raise ValueError(
            f"{top_groups} groups of {num_experts // num_groups} experts are fewer than top_k={top_k} experts"
        )


def limit_to_groups(scores_TE: Tensor, num_groups: int, top_groups: int) -> Tensor:
    """`scores_TE` with -inf outside each token's best groups, by the sum of a group's two best scores.

    DeepSeek-V3 (2412.19437), section 2.1.2, node-limited routing; there a group counts by its K / M best scores, which
    are two. Groups are experts that stand one after another.
    """
    if top_groups == num_groups:
        return scores_TE
    num_tokens, num_experts = scores_TE.shape
    size = num_experts // num_groups
    grouped_TGe = scores_TE.view(num_tokens, num_groups, size)
    best_TM = grouped_TGe.topk(min(2, size), dim=2).values.sum(2).topk(top_groups, dim=1).indices
    kept_TG = torch.zeros(num_tokens, num_groups, dtype=torch.bool, device=scores_TE.device).scatter(1, best_TM, True)
    kept_TE = kept_TG.unsqueeze(2).expand(-1, -1, size).reshape(num_tokens, num_experts)
    return scores_TE.masked_fill(~kept_TE, -torch.inf)
