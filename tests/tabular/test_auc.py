"""The AUC from ranks against a count of all pairs."""

import pytest
import torch

from fastmoe.tabular.auc import auc


def brute_force(scores, labels):
    positive, negative = scores[labels == 1], scores[labels == 0]
    wins = (positive[:, None] > negative).sum() + 0.5 * (positive[:, None] == negative).sum()
    return wins.item() / (len(positive) * len(negative))


@pytest.mark.parametrize("levels", [1, 2, 5, 1000])
@pytest.mark.parametrize("rows", [2, 3, 17, 400])
def test_equals_the_count_of_all_pairs(rows, levels):
    scores, labels = torch.randint(levels, (rows,)).float(), torch.randint(2, (rows,)).float()
    labels[:2] = torch.tensor([0.0, 1.0])
    assert auc(scores, labels) == pytest.approx(brute_force(scores, labels), abs=1e-12)


def test_known_values():
    labels = torch.tensor([0, 0, 1, 1])
    assert auc(torch.tensor([1, 2, 3, 4]), labels) == 1
    assert auc(torch.tensor([4, 3, 2, 1]), labels) == 0
    assert auc(torch.tensor([0.1, 0.4, 0.35, 0.8]), labels) == 0.75
    assert auc(torch.zeros(4), labels) == 0.5
    assert auc(torch.tensor([-torch.inf, 0, 1, torch.inf]), labels == 1) == 1


def test_only_the_order_of_scores_counts():
    scores, labels = torch.randn(100, dtype=torch.float64), torch.randint(2, (100,))
    order = torch.randperm(100)
    assert auc(scores, labels) == auc(scores.exp()[order], labels[order])
    assert auc(scores, labels) == pytest.approx(1 - auc(-scores, labels))


@pytest.mark.parametrize(
    ("scores", "labels", "message"),
    [
        ([0.1, 0.2], [1, 1], "both classes, got 2 positive and 0 negative"),
        ([], [], "both classes, got 0 positive"),
        ([0.1, float("nan")], [0, 1], "NaN in 1 of 2"),
        ([0.1, 0.2], [0, 2], r"labels must be 0 or 1, got \[2.0\]"),
        ([0.1, 0.2], [0], r"\(T,\) both, got \(2,\), \(1,\)"),
    ],
)
def test_errors(scores, labels, message):
    with pytest.raises(ValueError, match=message):
        auc(torch.tensor(scores), torch.tensor(labels, dtype=torch.float32))
