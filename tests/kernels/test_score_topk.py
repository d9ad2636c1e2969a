"""Scores, the K best and their weights: the plain backends against the formula."""

import pytest
import torch

from fastmoe import kernels

pytestmark = pytest.mark.usefixtures("poison")
BACKENDS = ["reference", "torch"]
KINDS = [("softmax", True), ("softmax", False), ("sigmoid", True), ("sigmoid", False)]


def by_formula(logits, top_k, score_function, normalize):
    """Written anew, a token at a time."""
    scores, weights, ids = [], [], []
    for z in logits:
        s = z.exp() / z.exp().sum() if score_function == "softmax" else 1 / (1 + (-z).exp())
        best = sorted(range(len(z)), key=lambda e, s=s: -s[e].item())[:top_k]
        scores.append(s)
        weights.append(s[best] / s[best].sum() if normalize else s[best])
        ids.append(best)
    return torch.stack(scores), torch.stack(weights), torch.tensor(ids)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("score_function", "normalize"), KINDS)
@pytest.mark.parametrize(("T", "E", "K"), [(7, 5, 2), (1, 1, 1), (4, 6, 6), (9, 129, 3)])
def test_against_the_formula(backend, score_function, normalize, T, E, K):
    logits = torch.randn(T, E, dtype=torch.float64, requires_grad=True)
    upstream = torch.randn(T, E), torch.randn(T, K)
    results = []
    for function in (kernels.score_topk, by_formula):
        options = {"backend": backend} if function is kernels.score_topk else {}
        scores, weights, ids = function(logits, K, score_function, normalize=normalize, **options)
        (grad,) = torch.autograd.grad((scores * upstream[0]).sum() + (weights * upstream[1]).sum(), logits)
        results.append((scores, weights, grad, ids))
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-12)
    assert results[0][-1].dtype == torch.int64


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("score_function", "normalize"), KINDS)
def test_gradcheck(backend, score_function, normalize):
    logits = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    options = {"normalize": normalize, "backend": backend}
    assert torch.autograd.gradcheck(lambda z: kernels.score_topk(z, 2, score_function, **options)[:2], logits)


@pytest.mark.parametrize("backend", BACKENDS)
def test_scores_too_small_for_their_sum(backend):
    """Sigmoids of -1000 are all zero; their shares are not."""
    logits = torch.tensor([[-1000.0, -1001.0, -1000.0]], requires_grad=True)
    scores, weights, _ = kernels.score_topk(logits, 3, "sigmoid", backend=backend)
    assert not scores.any()
    torch.testing.assert_close(weights.sort().values, torch.softmax(logits, 1).sort().values)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_no_token(backend, dtype):
    logits = torch.zeros(0, 4, dtype=dtype, requires_grad=True)
    scores, weights, ids = kernels.score_topk(logits, 2, backend=backend)
    assert (scores.shape, weights.shape, ids.shape) == ((0, 4), (0, 2), (0, 2))
    assert (scores.dtype, weights.dtype, ids.dtype) == (dtype, dtype, torch.int64)
    (scores.sum() + weights.sum()).backward()
    assert logits.grad.shape == (0, 4)


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_changes_nothing(backend):
    logits = torch.randn(4, 5)
    plain = kernels.score_topk(logits, 2, backend=backend)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = kernels.score_topk(logits, 2, backend=backend)
    for a, b in zip(plain, mixed, strict=True):
        assert torch.equal(a, b)


def test_bad_arguments():
    good = torch.randn(3, 4)
    for args, message in [
        ((good[0], 2), r"logits must be \(T, E\) in float32 or float64, got torch.float32 \(4,\)"),
        ((good.bfloat16(), 2), r"logits must be \(T, E\) in float32 or float64, got torch.bfloat16 \(3, 4\)"),
        ((good, 0), "top_k must be a whole number from 1 to E = 4, got 0"),
        ((good, 5), "top_k must be a whole number from 1 to E = 4, got 5"),
        ((good, 2.0), "top_k must be a whole number from 1 to E = 4, got 2.0"),
        ((good, 2, "softmaxx"), "unknown score_function 'softmaxx'. Did you mean 'softmax'"),
    ]:
        with pytest.raises(ValueError, match=message):
            kernels.score_topk(*args)
    with pytest.raises(ValueError, match="normalize must be True or False, got 'stop_gradient'"):
        kernels.score_topk(good, 2, normalize="stop_gradient")
