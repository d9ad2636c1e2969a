"""Balance losses. An even load gives exactly 1; a token mask leaves tokens out."""

import torch
from torch import Tensor

from fastmoe._processes import ALONE, Processes


def load_balance_loss(
    probs_TE: Tensor, expert_ids_TK: Tensor, token_mask_T: Tensor | None = None, processes: Processes = ALONE
) -> Tensor:
    """`E * sum_e f_e * P_e`: Switch Transformer (Fedus et al. 2021, 2101.03961), equations 4 to 6.

    f_e is the share of choices that went to expert e (no gradient), P_e its mean probability. 1 when both are even,
    E when one expert gets all. With K choices per token f_e counts all of them, as in GShard's top-2.

    Args:
        probs_TE: probabilities over all experts.
        expert_ids_TK: int64, chosen experts.
        token_mask_T: bool; False tokens do not count.
        processes: those that share the batch; f and P are of all of it.

    Returns:
        A scalar; 0 where there is no token.
    """
    num_experts, top_k = probs_TE.shape[1], expert_ids_TK.shape[1]
    counted_T = _counted(probs_TE, token_mask_T)
    counted_N = counted_T.unsqueeze(1).expand(-1, top_k).reshape(-1)
    chosen_E = probs_TE.new_zeros(num_experts).scatter_add(0, expert_ids_TK.reshape(-1), counted_N)
    probs_E = (probs_TE * counted_T.unsqueeze(1)).sum(0)
    sums = processes.sum_for_loss(torch.cat([chosen_E, probs_E, counted_T.sum().unsqueeze(0)]))
    chosen_E, probs_E, num_tokens = sums[:num_experts], sums[num_experts:-1], sums[-1].clamp(min=1)
    return num_experts * (chosen_E / (num_tokens * top_k) * (probs_E / num_tokens)).sum()


def sequence_balance_loss(
    probs_TE: Tensor,
    expert_ids_TK: Tensor,
    num_sequences: int,
    token_mask_T: Tensor | None = None,
    processes: Processes = ALONE,
) -> Tensor:
    """Mean over sequences of `sum_e f_e * P_e` within each: DeepSeek-V3 (2412.19437), equations 17 to 20.

    f_e is E times the share of the sequence's choices that went to expert e (no gradient), P_e its mean
    probability: its score over the sum of all experts' scores.

    Args:
        probs_TE: each token's sum to 1.
        expert_ids_TK: int64, chosen experts.
        num_sequences: the tokens are that many sequences of one length, one after another.
        token_mask_T: bool; False tokens do not count, nor do sequences without any other.
        processes: those that share the batch; the mean is over the sequences of all.

    Returns:
        A scalar; 0 where there is no token.
    """
    (num_tokens, num_experts), top_k = probs_TE.shape, expert_ids_TK.shape[1]
    length = num_tokens // max(num_sequences, 1)
    counted_BS1 = _counted(probs_TE, token_mask_T).view(num_sequences, length, 1)
    probs_BE = (probs_TE.view(num_sequences, length, num_experts) * counted_BS1).sum(1)
    counted_BN = counted_BS1.expand(-1, -1, top_k).reshape(num_sequences, length * top_k)
    chosen_BE = probs_TE.new_zeros(num_sequences, num_experts)
    chosen_BE = chosen_BE.scatter_add(1, expert_ids_TK.reshape(num_sequences, length * top_k), counted_BN)
    tokens_B1 = counted_BS1.sum(1)
    least_B1 = tokens_B1.clamp(min=1)
    losses_B = num_experts * (chosen_BE / (least_B1 * top_k) * (probs_BE / least_B1)).sum(1)
    totals = torch.stack([losses_B.sum(), (tokens_B1 > 0).to(losses_B.dtype).sum()])
    total, sequences = processes.sum_for_loss(totals).unbind()
    return total / sequences.clamp(min=1)


def cv_squared(load_E: Tensor) -> Tensor:
    """`1 + CV(load)^2 = E * sum(load^2) / sum(load)^2`: 1 when even, E when one expert has all.

    The squared coefficient of variation of Shazeer et al. 2017 (1701.06538), equations 7 and 11, plus 1: same gradient.

    Args:
        load_E: floating, not negative.

    Returns:
        A scalar; 0 where there is no load.
    """
    return len(load_E) * load_E.square().sum() / load_E.sum().square().clamp(min=torch.finfo(load_E.dtype).tiny)


def z_loss(logits_TE: Tensor, token_mask_T: Tensor | None = None, processes: Processes = ALONE) -> Tensor:
    """Mean over tokens of `logsumexp(logits)^2`: ST-MoE (Zoph et al. 2022, 2202.08906), equation 5.

    Returns:
        A scalar; 0 where there is no token.
    """
    counted_T = _counted(logits_TE, token_mask_T)
    squares_T = torch.logsumexp(logits_TE, dim=1).square()
    total, num_tokens = processes.sum_for_loss(torch.stack([(squares_T * counted_T).sum(), counted_T.sum()])).unbind()
    return total / num_tokens.clamp(min=1)


def _counted(like_TE: Tensor, token_mask_T: Tensor | None) -> Tensor:
    if token_mask_T is None:
        return like_TE.new_ones(like_TE.shape[0])
    return token_mask_T.to(like_TE.dtype)
