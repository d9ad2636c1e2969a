"""What FastMoE documents, as plain loops over tokens and choices; ground truth of the tests of `fmoe`."""

import torch
from torch import nn

import fmoe


def mixture(rows_TD, expert_ids_TK, weights_TK, experts):
    """Each token's weighted sum of `experts[e](row)`, one token and one choice at a time."""
    sums = []
    for row_D, ids_K, weights_K in zip(rows_TD, expert_ids_TK.tolist(), weights_TK, strict=True):
        answers = [w * experts[e](row_D.unsqueeze(0))[0] for e, w in zip(ids_K, weights_K, strict=True) if e >= 0]
        sums.append(sum(answers) if answers else torch.zeros_like(row_D))
    return torch.stack(sums)


def mlps(layer):
    """The experts of an `FMoETransformerMLP`, each as a function of rows."""

    def one(expert):
        up, down = expert.htoh4, expert.h4toh
        return lambda rows: expert.activation(rows @ up.weight[0].T + up.bias[0]) @ down.weight[0].T + down.bias[0]

    return [one(expert) for expert in layer.experts]


def softmax_topk(logits_TE, top_k):
    """The K best experts of each token and their weights; with K = 1 the weight is the probability among all."""
    ids, weights = [], []
    for logits_E in logits_TE:
        best = sorted(range(len(logits_E)), key=lambda e: -logits_E[e].item())[:top_k]
        shares = (
            logits_E.exp() / logits_E.exp().sum() if top_k == 1 else logits_E[best].exp() / logits_E[best].exp().sum()
        )
        ids.append(best)
        weights.append(shares[best] if top_k == 1 else shares)
    return torch.tensor(ids), torch.stack(weights)


def outcome(function, module, *inputs):
    """`function(*inputs)`'s output and the gradients of inputs and parameters, by name, for a fixed upstream."""
    module.zero_grad()
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    out = function(*leaves)
    generator = torch.Generator().manual_seed(7)
    out.backward(torch.randn(out.shape, generator=generator, dtype=out.dtype))
    found = {"out": out.detach()} | {f"x{i}": leaf.grad for i, leaf in enumerate(leaves)}
    for name, parameter in module.named_parameters():
        found[name] = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.clone()
    return found


class RowExpert(nn.Module):
    """An expert as FastMoE calls them, `(rows, counts)`."""

    def __init__(self, d_model):
        super().__init__()
        self.linear = nn.Linear(d_model, d_model)
        self.counts = []

    def forward(self, inp, fwd_expert_count):
        self.counts.append(fwd_expert_count.tolist())
        return self.linear(inp).tanh()


class Fused(fmoe.FMoE):
    """A subclass that sets its experts itself: one module for all of them."""

    def __init__(self, num_expert, d_model, d_hidden, **options):
        super().__init__(num_expert, d_model, **options)
        self.experts = fmoe.transformer._Expert(num_expert, d_model, d_hidden, torch.nn.functional.silu)
        self.mark_parallel_comm("dp")
