"""Tied softmax, plain and adaptive."""

import math

import pytest
import torch
from tiny_models import MAKERS, large, random_tokens

from fastmoe.models import TransformerXL, TransformerXLConfig, language_model_step
from fastmoe.models.vocabulary import TiedAdaptive, TiedSoftmax

CUTOFFS = (6, 10)


def test_the_adaptive_embedding_is_made_of_the_softmax_weights():
    layer, tokens = TiedAdaptive(20, 8, CUTOFFS, 2.0), torch.arange(20)[None]
    embedded = layer(tokens)[0] / math.sqrt(8)
    torch.testing.assert_close(embedded[:6], layer.softmax.head.weight[:6])
    for cluster, (low, high) in enumerate([(6, 10), (10, 20)]):
        project, vectors = layer.softmax.tail[cluster]
        assert vectors.weight.shape == (high - low, 8 // 2 ** (cluster + 1))
        torch.testing.assert_close(embedded[low:high], vectors.weight @ project.weight)


def test_the_adaptive_softmax_is_that_of_two_steps():
    layer, x, targets = TiedAdaptive(20, 8, CUTOFFS, 2.0), torch.randn(4, 5, 8), torch.randint(20, (4, 5))
    head = (x @ layer.softmax.head.weight.T).log_softmax(-1)
    parts = [head[..., :6]]
    for cluster, (project, vectors) in enumerate(layer.softmax.tail):
        inside = (x @ project.weight.T @ vectors.weight.T).log_softmax(-1)
        parts.append(head[..., 6 + cluster, None] + inside)
    expected = torch.cat(parts, dim=-1)
    torch.testing.assert_close(layer.logits(x), expected)
    torch.testing.assert_close(layer.loss(x, targets), -expected.gather(-1, targets[..., None]).mean())


class InAndOut(torch.nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, tokens):
        return self.layer.loss(self.layer(tokens), tokens.flip(0))


@pytest.mark.parametrize("layer", [TiedAdaptive(20, 8, CUTOFFS, 2.0), TiedSoftmax(20, 8)], ids=["adaptive", "plain"])
def test_both_directions_give_the_one_weight_its_gradient(layer):
    model, tokens = InAndOut(layer).double(), torch.randint(20, (2, 30))
    names, values = zip(*model.named_parameters(), strict=True)

    def loss(*values):
        return torch.func.functional_call(model, dict(zip(names, values, strict=True)), (tokens,))

    assert torch.autograd.gradcheck(loss, values, fast_mode=True)


@pytest.mark.parametrize("cutoffs", [(), (50, 150)], ids=str)
def test_it_trains_under_autocast(cutoffs):
    config = TransformerXLConfig(n_layer=1, n_head=2, d_model=16, d_hidden=32, cutoffs=cutoffs, num_experts=4)
    model, tokens = TransformerXL(config), torch.randint(256, (2, 9))
    with torch.autocast("cpu", torch.bfloat16):
        _, memory = language_model_step(model, tokens, tokens)
        loss, _ = language_model_step(model, tokens, tokens, memory)
    loss.backward()
    assert loss.dtype == memory.dtype == torch.float32
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_plain_embeddings_are_the_matrix_times_the_root_of_the_width():
    layer, tokens = TiedSoftmax(20, 16), torch.arange(20)[None]
    torch.testing.assert_close(layer(tokens)[0], 4 * layer.weight)


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
@pytest.mark.parametrize(
    ("dtype", "expected", "rel"),
    [
        (torch.float64, torch.float64, 1e-12),
        (torch.float32, torch.float32, 1e-6),
        (torch.bfloat16, torch.float32, 1e-6),
        (torch.float16, torch.float32, 1e-6),
    ],
)
def test_the_loss_is_exact_for_the_logits_whatever_the_dtype_of_the_weights(make, dtype, expected, rel):
    model, tokens = large(make()).to(dtype), random_tokens(2, 5)
    loss = model(tokens, tokens.flip(1))[1]
    assert loss.dtype == expected
    chosen = model(tokens)[0].double().log_softmax(-1).gather(2, tokens.flip(1)[..., None])
    assert loss.item() == pytest.approx(-chosen.mean().item(), rel=rel)


def test_adaptive_log_probabilities_are_float32_at_least():
    layer, x = TiedAdaptive(20, 8, CUTOFFS, 2.0).bfloat16(), torch.randn(4, 5, 8, dtype=torch.bfloat16)
    assert layer.logits(x).dtype == torch.float32
    torch.testing.assert_close(layer.logits(x).exp().sum(-1), torch.ones(4, 5))


def test_the_adaptive_loss_is_that_of_torch():
    layer, x, targets = TiedAdaptive(20, 8, CUTOFFS, 2.0), torch.randn(4, 5, 8), torch.randint(6, (4, 5))
    for targets_BS in (targets, targets + 6, targets + 14, targets * 3):  # the head alone; one cluster; the last; all
        expected = layer.softmax(x.flatten(0, 1), targets_BS.flatten()).loss
        torch.testing.assert_close(layer.loss(x, targets_BS), expected)
        torch.testing.assert_close(layer.logits(x).flatten(0, 1), layer.softmax.log_prob(x.flatten(0, 1)))
