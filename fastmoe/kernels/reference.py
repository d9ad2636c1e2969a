"""The ground truth: plain PyTorch loops over experts, differentiated by autograd. Slow, and meant to be read."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastmoe.kernels.activations import activate
from fastmoe.kernels.contract import Plan, ids_out_of_range


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Sums over a token's experts are taken in float32 at least."""
    return torch.promote_types(dtype, torch.float32)


def sigmoid_shares(logits_TE: Tensor) -> Tensor:
    """`s / sum(s)` along dimension 1 for s = sigmoid(logits), also where every s is too small for its dtype."""
    return torch.softmax(F.logsigmoid(logits_TE), dim=1)


def score_topk(logits_TE: Tensor, top_k: int, score_function: str, normalize: bool) -> tuple[Tensor, Tensor, Tensor]:
    """See `fastmoe.kernels.score_topk`; shared by the backends that have no kernel for it."""
    softmax = score_function == "softmax"
    scores_TE = torch.softmax(logits_TE, dim=1) if softmax else logits_TE.sigmoid()
    weights_TK, expert_ids_TK = scores_TE.topk(top_k, dim=1)
    if normalize and softmax:
        weights_TK = weights_TK / weights_TK.sum(dim=1, keepdim=True)
    elif normalize:
        weights_TK = sigmoid_shares(logits_TE.gather(1, expert_ids_TK))
    return scores_TE, weights_TK, expert_ids_TK


class ReferenceBackend:
    """See `fastmoe.kernels` for each kernel's arguments."""

    name = "reference"
    optional = False

    def available(self) -> str | None:
        return None

    def refuses(self, op: str, x: Tensor, *more: Any) -> str | None:
        return None

    def plan(self, expert_ids_N: Tensor, num_experts: int) -> Plan:
        rows_of = [(expert_ids_N == e).nonzero().flatten() for e in (*range(num_experts), -1)]
        if sum(map(len, rows_of)) != len(expert_ids_N):
            raise ids_out_of_range(expert_ids_N, num_experts)
        counts = torch.tensor([len(rows) for rows in rows_of[:-1]], device=expert_ids_N.device)
        return Plan(torch.cat(rows_of), counts.cumsum(0).to(torch.int32))

    def grouped_mm(self, rows_NI: Tensor, weight_EOI: Tensor, bias_EO: Tensor | None, offsets_E: Tensor) -> Tensor:
        outputs, start = [], 0
        for e, end in enumerate(offsets_E.tolist()):
            outputs.append(F.linear(rows_NI[start:end], weight_EOI[e], None if bias_EO is None else bias_EO[e]))
            start = end
        dropped = rows_NI.new_zeros(len(rows_NI) - start, weight_EOI.shape[1])
        return torch.cat([*outputs, dropped])

    def expert_mlp(
        self,
        x_TD: Tensor,
        token_ids_N: Tensor,
        weights_N: Tensor,
        plan: Plan,
        w1: Tensor,
        b1: Tensor | None,
        w2: Tensor,
        b2: Tensor | None,
        activation: str,
        rows_per_token: int,
    ) -> Tensor:
        rows_ND = x_TD[token_ids_N[plan.order_N]]
        hidden_NH = activate(activation, self.grouped_mm(rows_ND, w1, b1, plan.offsets_E))
        out_ND = self.grouped_mm(hidden_NH, w2, b2, plan.offsets_E)
        return self.combine(out_ND, token_ids_N, weights_N, plan, len(x_TD))

    def combine(self, rows_NO: Tensor, token_ids_N: Tensor, weights_N: Tensor, plan: Plan, num_tokens: int) -> Tensor:
        dtype = accumulation_dtype(rows_NO.dtype)
        y_TO = torch.zeros(num_tokens, rows_NO.shape[1], dtype=dtype, device=rows_NO.device)
        for e_start, e_end in zip([0, *plan.offsets_E.tolist()], plan.offsets_E.tolist(), strict=False):
            order = plan.order_N[e_start:e_end]
            weighted = rows_NO[e_start:e_end].to(dtype) * weights_N[order].to(dtype).unsqueeze(1)
            y_TO = y_TO.index_add(0, token_ids_N[order], weighted)
        return y_TO.to(rows_NO.dtype)

    def score_topk(
        self, logits_TE: Tensor, top_k: int, score_function: str, normalize: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        return score_topk(logits_TE, top_k, score_function, normalize)
