"""Hash routing against Roller et al. 2021, sections 3.1 and 3.2, and how token ids reach it."""

import copy
import pickle
from collections import Counter

import pytest
import torch
from by_hand import MASKS, assert_refused, capacity_of, counted, serve
from torch import nn
from torch.utils.checkpoint import checkpoint

import fastmoe
from fastmoe.models import GPT, GPTConfig
from fastmoe.routers import HashRouter, RoutingContext

IDS_T = torch.tensor([0, 3, 3, 10, 7, 0, 3, 2, 1])


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("factor", [None, 0.5])
@pytest.mark.parametrize("top_k", [1, 2])
def test_an_id_has_its_experts(top_k, factor, mask, training):
    router = HashRouter(4, 5, top_k, vocab_size=11, capacity_factor=factor).train(training)
    mask_T = MASKS[mask]
    routing = router(torch.randn(9, 4), RoutingContext(mask_T, IDS_T))
    table = router.table_VK.tolist()
    who = counted(9, mask_T)
    wished = [table[v] if t in who else [-1] * top_k for t, v in enumerate(IDS_T.tolist())]
    served = serve(wished, who, capacity_of(factor, len(who), top_k, 5) if factor else 9)
    assert routing.expert_ids_N.tolist() == [e for row in served for e in row]
    assert routing.weights_N.tolist() == [1 / top_k] * (9 * top_k)
    assert not routing.losses
    assert not list(router.parameters())
    assert not routing.weights_N.requires_grad


@pytest.mark.parametrize("vocab_size", [1, 4, 11, 12])
@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_table_is_balanced_in_each_column(top_k, vocab_size):
    for counts in (None, [1.0] * vocab_size):
        table_VK = HashRouter(4, 4, top_k, vocab_size=vocab_size, token_counts=counts).table_VK
        assert all(len(set(row)) == top_k for row in table_VK.tolist())
        for column in table_VK.t().tolist():
            sizes = [Counter(column)[e] for e in range(4)]
            assert max(sizes) - min(sizes) <= 1


def test_table_depends_on_the_seed_alone():
    tables = []
    for seed in (0, 0, 1):
        torch.randn(3)
        tables.append(HashRouter(4, 8, 2, vocab_size=100, seed=seed).table_VK)
    assert torch.equal(tables[0], tables[1])
    assert not torch.equal(tables[0], tables[2])
    neighbours = HashRouter(4, 8, 1, vocab_size=4096).table_VK.view(-1)
    assert (neighbours[1:] == (neighbours[:-1] + 1) % 8).float().mean() < 0.2


@pytest.mark.parametrize("top_k", [1, 2])
def test_balanced_assignment_gives_the_commonest_id_to_the_lightest_expert(top_k):
    counts = [50.0, 1.0, 20.0, 20.0, 9.0, 30.0, 0.0, 5.0]
    table = HashRouter(4, 3, top_k, vocab_size=8, token_counts=counts).table_VK.tolist()
    loads = [[0.0] * 3 for _ in range(top_k)]
    for v in (0, 5, 2, 3, 4, 7, 1, 6):
        for k in range(top_k):
            open_to = [e for e in range(3) if e not in table[v][:k]]
            assert loads[k][table[v][k]] == min(loads[k][e] for e in open_to)
            loads[k][table[v][k]] += counts[v]
    assert max(loads[0]) <= 50


def test_the_layer_takes_ids_in_any_shape():
    layer = fastmoe.MoE(4, 5, 2, d_hidden=8, router="hash", router_options={"vocab_size": 11})
    x = torch.randn(3, 3, 4)
    y = layer(x, token_ids=IDS_T.view(3, 3))
    layer.token_ids = IDS_T.view(3, 3)
    torch.testing.assert_close(layer(x), y)
    table_VK, experts = layer.router.table_VK, layer.experts
    for t in range(9):
        outputs = [
            torch.nn.functional.gelu(experts.w1[e] @ x.view(9, 4)[t] + experts.b1[e]) for e in table_VK[IDS_T[t]]
        ]
        by_hand = sum(experts.w2[e] @ h + experts.b2[e] for e, h in zip(table_VK[IDS_T[t]], outputs, strict=True)) / 2
        torch.testing.assert_close(y.view(9, 4)[t], by_hand)


def tiny_gpt():
    config = GPTConfig(vocab_size=11, block_size=8, n_layer=2, n_head=2, d_model=8)
    return fastmoe.moefy(GPT(config), num_experts=4, top_k=1, router="hash", router_options={"vocab_size": 11})


@pytest.mark.parametrize("by_name", [True, False])
def test_feed_token_ids(by_name):
    model = tiny_gpt()
    tokens_BS = torch.randint(11, (3, 8))
    with pytest.raises(ValueError, match="goes by token ids: call the layer with token_ids="):
        model(tokens_BS)
    handle = fastmoe.feed_token_ids(model, "token_embedding" if by_name else model.token_embedding)
    for ids_BS in (tokens_BS, torch.randint(11, (2, 5))):
        model(ids_BS)
        for layer in fastmoe.moe_layers(model).values():
            expected = torch.bincount(layer.router.table_VK[ids_BS].flatten(), minlength=4)
            assert layer.last_stats.counts.tolist() == expected.tolist()
    handle.remove()
    with pytest.raises(ValueError, match=r"token_ids must be int64 \(1, 3\), one for each token"):
        model(torch.randint(11, (1, 3)))


@pytest.mark.parametrize("reentrant", [True, False])
def test_fed_ids_serve_recomputation(reentrant):
    model = tiny_gpt()
    fastmoe.feed_token_ids(model, "token_embedding")
    block, x = model.blocks[0], torch.randn(2, 8, 8, requires_grad=True)
    model.token_embedding(torch.randint(11, (2, 8)))
    (plain,) = torch.autograd.grad(block(x).square().sum(), x)
    checkpoint(block, x, use_reentrant=reentrant).square().sum().backward()
    torch.testing.assert_close(x.grad, plain)


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_feeds_itself(clone):
    model = tiny_gpt()
    fastmoe.feed_token_ids(model, "token_embedding")
    twin, tokens_BS = clone(model), torch.randint(11, (2, 5))
    expected, _ = model(tokens_BS)
    for layer in fastmoe.moe_layers(model).values():
        layer.token_ids = None
    torch.testing.assert_close(twin(tokens_BS)[0], expected)
    assert all(layer.token_ids is None for layer in fastmoe.moe_layers(model).values())


def test_ids_of_another_shape_are_refused_though_they_are_as_many():
    layer = fastmoe.MoE(4, 5, 2, router="hash", router_options={"vocab_size": 11})
    layer.token_ids = torch.zeros(2, 6, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"token_ids must be int64 \(3, 4\), one for each token; got .* \(2, 6\)"):
        layer(torch.randn(3, 4, 4))
    assert layer(torch.randn(12, 4)).shape == (12, 4)


def test_feed_token_ids_is_told_what_fits():
    with pytest.raises(ValueError, match="has no MoE layer whose router goes by token ids"):
        fastmoe.feed_token_ids(nn.Sequential(fastmoe.MoE(4, 2)), "0")
    with pytest.raises(ValueError, match="GPT has no module 'embed'"):
        fastmoe.feed_token_ids(tiny_gpt(), "embed")
    with pytest.raises(ValueError, match=r"GPT has no module Embedding\(3, 4\)"):
        fastmoe.feed_token_ids(tiny_gpt(), nn.Embedding(3, 4))


def test_padding_may_have_any_id():
    router = HashRouter(4, 5, 1, vocab_size=11)
    context = RoutingContext(torch.tensor([True, False]), torch.tensor([3, -100]))
    assert router(torch.randn(2, 4), context).expert_ids_N.tolist() == [int(router.table_VK[3, 0]), -1]


@pytest.mark.parametrize("bad", [-1, 11])
def test_an_id_outside_of_the_vocabulary(bad):
    router = HashRouter(4, 5, 1, vocab_size=11)
    with pytest.raises(ValueError, match=rf"token_ids must lie in 0..10 \(vocab_size - 1\), got .*{bad}"):
        router(torch.randn(2, 4), RoutingContext(token_ids_T=torch.tensor([3, bad])))


def test_no_ids_and_no_token():
    router = HashRouter(4, 5, 2, vocab_size=11)
    with pytest.raises(ValueError, match="goes by token ids"):
        router(torch.randn(2, 4))
    none = torch.zeros(0, dtype=torch.int64)
    assert router(torch.randn(0, 4), RoutingContext(token_ids_T=none)).expert_ids_N.shape == (0,)


def test_from_meta():
    options = {"vocab_size": 11, "token_counts": [1.0] * 11}
    layer = fastmoe.MoE(4, 5, 2, router="hash", router_options=options, device="meta")
    layer.to_empty(device="cpu")
    layer.reset_parameters()
    assert torch.equal(layer.router.table_VK, HashRouter(4, 5, 2, **options).table_VK)


@pytest.mark.parametrize(
    ("top_k", "options", "message"),
    [
        (1, {}, "router 'hash' needs vocab_size"),
        (1, {"vocab_size": 0}, "vocab_size must be a whole number >= 1"),
        (1, {"vocab_size": 3, "seed": -1}, "seed must be a whole number >= 0"),
        (1, {"vocab_size": 3, "token_counts": [1.0, 2.0]}, "token_counts must be 3 finite numbers >= 0"),
        (1, {"vocab_size": 2, "token_counts": 5}, "token_counts must be 2 finite numbers >= 0"),
        (1, {"vocab_size": 2, "token_counts": [1.0, float("nan")]}, "token_counts must be 2 finite numbers >= 0"),
        (1, {"vocab_size": 2, "token_counts": [1.0, -2.0]}, "token_counts must be 2 finite numbers >= 0"),
    ],
)
def test_bad_options(top_k, options, message):
    assert_refused("hash", top_k, options, message)
