"""BASE layers against Lewis et al. 2021, section 3."""

import pytest
import torch
from by_hand import (
    MASKS,
    assert_learns,
    assert_refused,
    assert_same,
    assert_silent_on_no_token,
    best,
    counted,
    linear,
    tokens,
)
from test_auction import assert_balanced, optimum

import fastmoe
from fastmoe.routers import BaseLayerRouter, RoutingContext
from fastmoe.routers.auction import EPS


def sigmoid(value):
    return 1 / (1 + (-value).exp())


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("num_experts", [5, 3, 1, 12])
def test_is_the_paper(num_experts, mask, training):
    router = BaseLayerRouter(4, num_experts)
    torch.nn.init.normal_(router.proj.weight)
    router, x_TD, mask_T = router.double().train(training), tokens(), MASKS[mask]
    who = counted(len(x_TD), mask_T)
    logits = linear(router.proj.weight, x_TD)
    if training:
        ids = router(x_TD, RoutingContext(mask_T)).expert_ids_N.tolist()
        assert [t for t, e in enumerate(ids) if e >= 0] == who
        assert_balanced(torch.tensor([ids[t] for t in who]), len(who), num_experts)
        scores = [[v.item() for v in logits[t]] for t in who]
        if num_experts < 12:
            span = max(max(row) - min(row) for row in scores)
            least = optimum(scores, num_experts) - (len(who) + num_experts) * EPS * span
            assert sum(logits[t][ids[t]].item() for t in who) >= least - 1e-9
    else:
        ids = [best(row, 1)[0] if t in who else -1 for t, row in enumerate(logits)]
    weights = [[sigmoid(row[e])] for row, e in zip(logits, ids, strict=True)]
    routing = assert_same(router, x_TD, mask_T, [[e] for e in ids], weights, {})
    assert (routing.dropped, routing.demand_E, routing.rows_per_token) == (0, None, 1)


def test_embeddings_start_orthogonal():
    weight_ED = BaseLayerRouter(16, 6).proj.weight
    torch.testing.assert_close(weight_ED @ weight_ED.t(), 0.01 * torch.eye(6))
    tall_ED = BaseLayerRouter(4, 6).proj.weight
    torch.testing.assert_close(tall_ED.t() @ tall_ED, 0.01 * torch.eye(4))
    assert BaseLayerRouter.own_init


def test_load_is_even_in_training_and_not_in_evaluation():
    layer, x = fastmoe.MoE(8, 4, 1, d_hidden=4, router="base"), torch.randn(3, 10, 8) + 2
    layer(x)
    assert sorted(fastmoe.stats(layer)[""].counts.tolist()) == [7, 7, 8, 8]
    layer.eval()(x)
    assert max(fastmoe.stats(layer)[""].counts.tolist()) > 8


@pytest.mark.parametrize("training", [True, False])
def test_no_token(training):
    assert_silent_on_no_token(BaseLayerRouter(4, 3).double().train(training))


def test_learns():
    assert_learns("base", 1)


@pytest.mark.parametrize(
    ("top_k", "options", "message"),
    [
        (2, {}, r"give top_k=1 \(the default of fastmoe.MoE is 2\), got top_k=2"),
        (1, {"stats_scope": "world"}, "unknown stats_scope 'world'"),
        (1, {"capacity_factor": 1.0}, "unknown option of router 'base' 'capacity_factor'"),
    ],
)
def test_bad_options(top_k, options, message):
    assert_refused("base", top_k, options, message)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_starts_anew_in_half_precision(dtype):
    layer = fastmoe.MoE(8, 4, 1, router="base", device="meta", dtype=dtype)
    layer.to_empty(device="cpu")
    layer.reset_parameters()
    weight_ED = layer.router.proj.weight.float()
    torch.testing.assert_close(weight_ED @ weight_ED.t(), 0.01 * torch.eye(4), atol=1e-3, rtol=0)
