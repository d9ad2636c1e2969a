"""Shares of sigmoid scores."""

import torch
import torch.nn.functional as F
from torch import Tensor


def sigmoid_shares(logits_TE: Tensor) -> Tensor:
    """`s / sum(s)` along dimension 1 for s = sigmoid(logits), also where every s is too small for its dtype."""
    return torch.softmax(F.logsigmoid(logits_TE), dim=1)
