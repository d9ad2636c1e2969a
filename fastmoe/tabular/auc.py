"""The area under the ROC curve, exactly."""

import torch
from torch import Tensor


def auc(scores_T: Tensor, labels_T: Tensor) -> float:
    """The share of pairs, one positive and one negative row, where the positive has the higher score; a tie is half.

    It is the Mann-Whitney statistic, from ranks: T log T, and whole numbers until the last division.

    Args:
        scores_T: `(T,)`, any real dtype.
        labels_T: `(T,)`, 0 or 1 (or bool).

    Raises:
        ValueError: other shapes, NaN, labels besides 0 and 1, or one of the two classes missing.
    """
    if scores_T.dim() != 1 or scores_T.shape != labels_T.shape:
        raise ValueError(f"scores and labels must be (T,) both, got {tuple(scores_T.shape)}, {tuple(labels_T.shape)}")
    if scores_T.isnan().any():
        raise ValueError(f"scores must be numbers, got NaN in {int(scores_T.isnan().sum())} of {len(scores_T)}")
    positive_T = labels_T == 1
    if not (positive_T | (labels_T == 0)).all():
        raise ValueError(f"labels must be 0 or 1, got {sorted(set(labels_T.tolist()) - {0, 1})[:5]}")
    positives = int(positive_T.sum())
    negatives = len(labels_T) - positives
    if not positives or not negatives:
        raise ValueError(f"AUC needs rows of both classes, got {positives} positive and {negatives} negative")
    _, group_T, sizes_G = torch.unique(scores_T, return_inverse=True, return_counts=True)
    twice_mean_rank_G = 2 * sizes_G.cumsum(0) - sizes_G + 1  # equal scores share the mean of their ranks
    twice_wins = int(twice_mean_rank_G[group_T[positive_T]].sum()) - positives * (positives + 1)
    return twice_wins / (2 * positives * negatives)
