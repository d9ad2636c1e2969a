"""Scores, the K best and their weights by Triton, against the reference."""

import pytest
import torch
from helpers import assert_measured

pytest.importorskip("triton")

from triton_cases import DEVICE

from fastmoe import kernels

pytestmark = pytest.mark.usefixtures("poison")
KINDS = [("softmax", True), ("softmax", False), ("sigmoid", True), ("sigmoid", False)]
SIZES = [(7, 1, 1), (40, 5, 2), (33, 5, 5), (9, 16, 16), (35, 63, 3), (33, 65, 8), (17, 129, 16), (5, 1024, 4)]


def results(backend, logits, top_k, kind, through=("scores", "weights")):
    """Scores, weights and the logits' gradient through those of them that are named; and the chosen experts."""
    logits = logits.detach().clone().requires_grad_()
    scores, weights, ids = kernels.score_topk(logits, top_k, kind[0], normalize=kind[1], backend=backend)
    torch.manual_seed(7)
    upstream = {"scores": torch.randn(scores.shape), "weights": torch.randn(weights.shape)}
    loss = sum(
        (out * upstream[name].to(out)).sum()
        for name, out in (("scores", scores), ("weights", weights))
        if name in through
    )
    loss.backward()
    return {"out": scores.detach(), "weights": weights.detach(), "logits": logits.grad}, ids


def three_ways(logits, top_k, kind, **options):
    got, ids = results("triton", logits, top_k, kind, **options)
    plain, plain_ids = results("reference", logits, top_k, kind, **options)
    exact, _ = results("reference", logits.double(), top_k, kind, **options)
    return (got, plain, exact), ids, plain_ids


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize(("T", "E", "K"), SIZES)
def test_against_the_reference(kind, T, E, K):
    logits = torch.linspace(-2, 2, E)[torch.rand(T, E).argsort(1)].to(DEVICE)  # far enough apart for one order
    for through in (("scores", "weights"), ("scores",), ("weights",)):
        compared, ids, plain_ids = three_ways(logits, K, kind, through=through)
        assert_measured(*compared)
        assert torch.equal(ids, plain_ids)
        assert ids.dtype == torch.int64


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_no_token(kind):
    got, ids = results("triton", torch.empty(0, 5, device=DEVICE), 2, kind)
    assert {name: tuple(t.shape) for name, t in got.items()} == {"out": (0, 5), "weights": (0, 2), "logits": (0, 5)}
    assert ids.shape == (0, 2)


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_among_equals_the_lowest_expert_is_first(kind):
    logits = torch.randint(3, (40, 9)).float().to(DEVICE)
    compared, ids, _ = three_ways(logits, 5, kind)
    assert torch.equal(compared[0]["out"].gather(1, ids), compared[0]["out"].topk(5).values)
    assert torch.equal(ids, logits.sort(dim=1, descending=True, stable=True).indices[:, :5])
    for values in compared:
        del values["logits"]  # depends on which of them are chosen
    assert_measured(*compared)
    _, ids, _ = three_ways(torch.zeros(3, 7, device=DEVICE), 4, kind)
    assert ids.tolist() == [[0, 1, 2, 3]] * 3


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("scale", [1e-8, 100.0, 1e4, 1e30])
def test_logits_of_any_size(kind, scale):
    logits = torch.linspace(-1, 1, 60)[torch.randperm(60)].view(10, 6).to(DEVICE) * scale
    (got, plain, exact), ids, _ = three_ways(logits, 2, kind)
    if kind[0] == "softmax" or scale < 100:  # else which of several sigmoids of exactly 1 are chosen is free
        assert_measured(got, plain, exact)
    assert all(t.isfinite().all() for t in got.values())
    assert torch.equal(got["out"].gather(1, ids), got["out"].topk(2).values)
    if kind[1]:
        torch.testing.assert_close(got["weights"].sum(1), torch.ones(10, device=DEVICE))


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_experts_that_are_ruled_out(kind):
    """Logits of minus infinity: never before others, and of no weight."""
    logits = torch.randn(30, 9)
    for t in range(30):
        logits[t, torch.randperm(9)[: t % 7]] = -torch.inf
    compared, ids, plain_ids = three_ways(logits.to(DEVICE), 2, kind)
    assert_measured(*compared)
    assert torch.equal(ids, plain_ids)
    scores, weights, ids = kernels.score_topk(logits.to(DEVICE), 4, kind[0], normalize=kind[1], backend="triton")
    ruled_out = logits.to(DEVICE).gather(1, ids) == -torch.inf
    assert ruled_out.any()
    assert not weights[ruled_out].any()
    assert not scores[logits.to(DEVICE) == -torch.inf].any()
    assert all(len(set(row)) == 4 for row in ids.tolist())


BAD_ROWS = {
    "one_nan": [0.0, 1.0, torch.nan, -1.0, 2.0],
    "nan_and_others_ruled_out": [-torch.inf, -torch.inf, -torch.inf, torch.nan, -torch.inf],
    "all_nan": [torch.nan] * 5,
    "all_ruled_out": [-torch.inf] * 5,
    "infinite": [0.0, 1.0, 2.0, torch.inf, 2.0],
    "infinite_both_ways": [-torch.inf, 1.0, torch.inf, -torch.inf, torch.inf],
}


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("name", BAD_ROWS)
@pytest.mark.parametrize("K", [1, 3, 5])
def test_a_bad_row_stays_one_row_and_names_experts_that_are_there(name, kind, K):
    logits = torch.randn(4, 5)
    logits[2] = torch.tensor(BAD_ROWS[name])
    (got, plain, _), ids, plain_ids = three_ways(logits.to(DEVICE), K, kind)
    good = [0, 1, 3]
    for key in got:
        torch.testing.assert_close(got[key][good], plain[key][good])
    assert torch.equal(ids[good], plain_ids[good])
    assert sorted(set(ids[2].tolist())) == sorted(ids[2].tolist())
    assert 0 <= int(ids.min()) <= int(ids.max()) < 5
    if kind[0] == "softmax":  # all of its scores are NaN, and so must the weights be
        assert plain["out"][2].isnan().all()
    torch.testing.assert_close(got["out"][2], plain["out"][2], equal_nan=True)
    torch.testing.assert_close(got["weights"][2].isnan(), plain["weights"][2].isnan())


@pytest.mark.parametrize("score_function", ["softmax", "sigmoid"])
def test_a_nan_is_chosen_first(score_function):
    logits = torch.randn(6, 5, device=DEVICE)
    logits[range(5), range(5)] = torch.nan
    _, _, ids = kernels.score_topk(logits, 2, score_function, backend="triton")
    assert ids[:5, 0].tolist() == list(range(5))


def test_strides_do_not_matter():
    logits = torch.randn(9, 12, device=DEVICE)
    strided = logits.T.contiguous().T
    assert not strided.is_contiguous()
    for kind in KINDS:
        leaves = [logits.clone().requires_grad_(), strided.requires_grad_()]
        upstream = torch.randn(3, 9, device=DEVICE).T  # of other strides too
        outs = [kernels.score_topk(z, 3, kind[0], normalize=kind[1], backend="triton") for z in leaves]
        assert all(torch.equal(a, b) for a, b in zip(*outs, strict=True))
        grads = [torch.autograd.grad(out[1], z, upstream)[0] for out, z in zip(outs, leaves, strict=True)]
        assert torch.equal(*grads)


def test_the_same_bits_twice():
    logits = torch.randn(30, 65, device=DEVICE)
    for kind in KINDS:
        (first, _), (second, _) = (results("triton", logits, 8, kind) for _ in range(2))
        assert all(torch.equal(first[name], second[name]) for name in first)


def test_second_derivative_is_refused():
    logits = torch.randn(4, 5, device=DEVICE, requires_grad=True)
    scores, _, _ = kernels.score_topk(logits, 2, backend="triton")
    (grad,) = torch.autograd.grad(scores.square().sum(), logits, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative; use backend='reference'"):
        grad.sum().backward()


@pytest.mark.parametrize(
    ("E", "K", "dtype", "reason"),
    [
        (1025, 2, torch.float32, "it takes up to 1024 experts, got 1025"),
        (40, 17, torch.float32, "it takes up to 16 experts chosen, got 17"),
        (8, 2, torch.float64, "it knows float32, got torch.float64"),
    ],
)
def test_what_is_refused(E, K, dtype, reason):
    logits = torch.randn(2, E, dtype=dtype, device=DEVICE)
    with pytest.raises(ValueError, match=f"backend 'triton' cannot serve score_topk: {reason}"):
        kernels.score_topk(logits, K, backend="triton")
    kernels.score_topk(logits, K)
