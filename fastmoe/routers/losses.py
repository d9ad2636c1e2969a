"""Balance losses. Each takes what one process sees; a token mask leaves tokens out."""

import torch
from torch import Tensor


def load_balance_loss(probs_TE: Tensor, expert_ids_TK: Tensor, token_mask_T: Tensor | None = None) -> Tensor:
    """`E * sum_e f_e * P_e`: Switch Transformer (Fedus et al. 2021, 2101.03961), equations 4 to 6.

    f_e is the share of choices that went to expert e (no gradient), P_e its mean probability. 1 when both are even,
    E when one expert gets all. With K choices per token f_e counts all of them, as in GShard's top-2.

    Args:
        probs_TE: probabilities over all experts.
        expert_ids_TK: int64, chosen experts.
        token_mask_T: bool; False tokens do not count.

    Returns:
        A scalar; 0 where there is no token.
    """
    num_experts, top_k = probs_TE.shape[1], expert_ids_TK.shape[1]
    counted_T = _counted(probs_TE, token_mask_T)
    num_tokens = counted_T.sum().clamp(min=1)
    counted_N = counted_T.unsqueeze(1).expand(-1, top_k).reshape(-1)
    chosen_E = probs_TE.new_zeros(num_experts).scatter_add(0, expert_ids_TK.reshape(-1), counted_N)
    share_E = chosen_E / (num_tokens * top_k)
    prob_E = (probs_TE * counted_T.unsqueeze(1)).sum(0) / num_tokens
    return num_experts * (share_E * prob_E).sum()


def z_loss(logits_TE: Tensor, token_mask_T: Tensor | None = None) -> Tensor:
    """Mean over tokens of `logsumexp(logits)^2`: ST-MoE (Zoph et al. 2022, 2202.08906), equation 5.

    Returns:
        A scalar; 0 where there is no token.
    """
    counted_T = _counted(logits_TE, token_mask_T)
    squares_T = torch.logsumexp(logits_TE, dim=1).square()
    return (squares_T * counted_T).sum() / counted_T.sum().clamp(min=1)


def _counted(like_TE: Tensor, token_mask_T: Tensor | None) -> Tensor:
    if token_mask_T is None:
        return like_TE.new_ones(like_TE.shape[0])
    return token_mask_T.to(like_TE.dtype)
