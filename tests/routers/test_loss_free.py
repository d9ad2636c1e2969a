"""Loss-free balancing against Wang et al. 2024, algorithm 1, and DeepSeek-V3, section 2.1.2, token by token."""

import copy
import gc
import pickle
import warnings
from collections import Counter

import pytest
import torch
from by_hand import (
    MASKS,
    assert_learns,
    assert_refused,
    assert_same,
    assert_silent_on_no_token,
    best,
    capacity_of,
    counted,
    linear,
    serve,
    tokens,
)
from torch.optim.optimizer import _global_optimizer_post_hooks
from torch.utils.checkpoint import checkpoint

import fastmoe
from fastmoe.routers import LossFreeRouter, RoutingContext


def allowed(biased, num_groups, top_groups):
    size = len(biased) // num_groups
    groups = [list(range(g * size, (g + 1) * size)) for g in range(num_groups)]
    worth = [sum(sorted((biased[e].item() for e in group), reverse=True)[:2]) for group in groups]
    kept = sorted(range(num_groups), key=lambda g: -worth[g])[:top_groups]
    return [e for g in sorted(kept) for e in groups[g]]


def sequence_loss(scores, top_k, who, num_sequences):
    """Equations 17 to 20: f and P within one sequence, by the plain scores."""
    E, length = len(scores[0]), len(scores) // num_sequences
    losses = []
    for b in range(num_sequences):
        inside = [t for t in who if t // length == b]
        if not inside:
            continue
        chosen = Counter(e for t in inside for e in best(scores[t], top_k))
        for_all = [sum(scores[t][e] / sum(scores[t]) for t in inside) / len(inside) for e in range(E)]
        losses.append(sum(E / (top_k * len(inside)) * chosen[e] * for_all[e] for e in range(E)))
    return sum(losses) / len(losses)


def by_hand(router, x_TD, mask_T, num_sequences):
    who, E, K = counted(len(x_TD), mask_T), router.num_experts, router.top_k
    scores = [[v.sigmoid() for v in row] for row in linear(router.proj.weight, x_TD)]
    ids, weights = [], []
    for row in scores:
        biased = [s.detach() + b for s, b in zip(row, router.bias_E, strict=True)]
        inside = allowed(biased, router.num_groups, router.top_groups)
        chosen = [inside[i] for i in best([biased[e] for e in inside], K)]
        total = sum(row[e] for e in chosen) if K > 1 else 1
        ids.append(chosen)
        weights.append([router.scale * row[e] / total for e in chosen])
    factor = router.capacity_factor
    served = serve(ids, who, capacity_of(factor, len(who), K, E) if factor else len(x_TD))
    return served, weights, {"sequence_balance": 0.5 * sequence_loss(scores, K, who, num_sequences)}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("num_sequences", [1, 3, 9])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize(
    ("top_k", "options"),
    [
        (1, {}),
        (2, {"scale": 2.5}),
        (2, {"num_groups": 3, "top_groups": 2}),
        (3, {"num_groups": 2, "top_groups": 1, "capacity_factor": 0.75}),
    ],
)
def test_is_the_paper(top_k, options, mask, num_sequences, training):
    router = LossFreeRouter(4, 6, top_k, sequence_loss_weight=0.5, **options)
    torch.nn.init.normal_(router.proj.weight)
    router, x_TD = router.double().train(training), tokens()
    router.bias_E.copy_(torch.randn(6))
    expected = by_hand(router, x_TD, MASKS[mask], num_sequences)
    assert_same(router, x_TD, MASKS[mask], *expected, num_sequences=num_sequences)


def test_defaults_are_the_papers():
    router = LossFreeRouter(4, 3, 2)
    assert (router.bias_update_rate, router.sequence_loss_weight) == (0.001, 1e-4)
    assert (router.normalize, router.capacity_factor, router.scale) == (True, None, 1.0)
    assert not LossFreeRouter(4, 3, 1).normalize


def test_even_load_is_the_weight():
    router = LossFreeRouter(4, 4, 1, sequence_loss_weight=0.25)
    router.proj.weight.data = torch.eye(4)
    assert router(torch.eye(4)).losses["sequence_balance"].item() == pytest.approx(0.25, rel=1e-6)


def one_expert(num_experts=3):
    """A layer whose router sends every token of ones to expert 0."""
    layer = fastmoe.MoE(2, num_experts, 1, d_hidden=2, router="loss_free")
    layer.router.proj.weight.data = torch.zeros(num_experts, 2)
    layer.router.proj.weight.data[0] = 1
    return layer, torch.optim.SGD(layer.parameters(), lr=0.0)


AFTER_ONE = [-0.001, 0.001, 0.001]


def bias(layer):
    return layer.router.bias_E.tolist()


def test_bias_moves_once_per_step_by_the_load_of_all_passes():
    layer, optimizer = one_expert()
    for _ in range(4):
        layer(torch.ones(5, 2)).sum().backward()
    assert bias(layer) == [0, 0, 0]
    optimizer.step()
    assert bias(layer) == pytest.approx(AFTER_ONE)
    optimizer.step()
    assert bias(layer) == pytest.approx(AFTER_ONE)
    layer(torch.ones(5, 2)).sum().backward()
    optimizer.step()
    assert bias(layer) == pytest.approx([-0.002, 0.002, 0.002])


def test_an_average_load_leaves_the_bias():
    """Loads 2, 1, 0: the mean is 1."""
    layer, optimizer = one_expert()
    layer.router.proj.weight.data = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, -1.0]])
    layer(torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])).sum().backward()
    optimizer.step()
    assert bias(layer) == pytest.approx([-0.001, 0, 0.001])


def test_recomputed_padded_and_evaluated_tokens_do_not_count():
    """Loads 3, 2, 1 once; twice the recomputed half they would tip the other way."""
    for reentrant in (True, False):
        layer, optimizer = one_expert()
        layer.router.proj.weight.data = 9 * torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, -1.0]])
        first, second, third = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]]), torch.tensor([[-1.0, -1.0]])
        layer(first.repeat(3, 1)).sum().backward()
        x = second.repeat(2, 1).requires_grad_()
        checkpoint(layer, x, use_reentrant=reentrant).sum().backward()
        layer(third.repeat(7, 1), torch.tensor([True] + 6 * [False])).sum().backward()
        layer.eval()(third.repeat(50, 1))
        optimizer.step()
        assert bias(layer) == pytest.approx([-0.001, 0, 0.001])


def test_wishes_count_not_what_capacity_leaves():
    layer = fastmoe.MoE(2, 3, 1, d_hidden=2, router="loss_free", router_options={"capacity_factor": 1.0})
    layer.router.proj.weight.data = 9 * torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, -1.0]])
    x = torch.tensor([[1.0, 0.0]] * 3 + [[0.0, 1.0]] * 2 + [[-1.0, -1.0]])
    layer(x).sum().backward()
    assert int(layer.last_stats.dropped) == 1
    torch.optim.SGD(layer.parameters(), lr=0.0).step()
    assert bias(layer) == pytest.approx([-0.001, 0, 0.001])


def test_only_the_optimizer_of_the_router_counts():
    layer, optimizer = one_expert()
    other = torch.optim.SGD(torch.nn.Linear(2, 2).parameters(), lr=0.0)
    layer(torch.ones(5, 2)).sum().backward()
    other.step()
    assert bias(layer) == [0, 0, 0]
    layer.router.update_bias()
    assert bias(layer) == pytest.approx(AFTER_ONE)
    optimizer.step()
    assert bias(layer) == pytest.approx(AFTER_ONE)


def test_rate_0_keeps_the_bias():
    layer = fastmoe.MoE(2, 3, 1, d_hidden=2, router="loss_free", router_options={"bias_update_rate": 0})
    layer(torch.ones(5, 2)).sum().backward()
    torch.optim.SGD(layer.parameters(), lr=0.0).step()
    assert bias(layer) == [0, 0, 0]


def test_bias_evens_out_a_skewed_router():
    torch.manual_seed(2)
    layer = fastmoe.MoE(4, 4, 2, d_hidden=2, router="loss_free", router_options={"bias_update_rate": 0.02})
    layer.router.proj.weight.data[0] += 3.0
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.0)
    loads = []
    for _ in range(60):
        layer(torch.randn(256, 4) + 0.5).sum().backward()
        optimizer.step()
        loads.append(layer.last_stats.counts.max().item() / 128)
    assert loads[0] > 1.6
    assert loads[-1] < 1.25


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))])
def test_a_copy_has_a_bias_and_a_load_of_its_own(clone):
    layer, optimizer = one_expert()
    layer(torch.ones(5, 2)).sum().backward()
    twin = clone(layer)
    torch.optim.SGD(twin.parameters(), lr=0.0).step()
    assert bias(twin) == bias(layer) == [0, 0, 0]
    twin(torch.ones(5, 2)).sum().backward()
    torch.optim.SGD(twin.parameters(), lr=0.0).step()
    assert (bias(twin), bias(layer)) == (pytest.approx(AFTER_ONE), [0, 0, 0])
    optimizer.step()
    assert bias(layer) == pytest.approx(AFTER_ONE)


def test_state_dict_has_the_bias_and_no_load():
    layer, optimizer = one_expert()
    assert set(layer.router.state_dict()) == {"proj.weight", "bias_E"}
    layer(torch.ones(5, 2)).sum().backward()
    optimizer.step()
    fresh, _ = one_expert()
    fresh.load_state_dict(layer.state_dict())
    assert bias(fresh) == bias(layer)


def test_nothing_is_left_of_a_router_that_is_gone():
    gc.collect()
    before = len(_global_optimizer_post_hooks)
    router = LossFreeRouter(4, 3, 2)
    assert len(_global_optimizer_post_hooks) == before + 1
    del router
    gc.collect()
    assert len(_global_optimizer_post_hooks) == before


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_bias_stays_in_float32(dtype):
    layer, _ = one_expert()
    layer.router.bias_E.fill_(0.1234567)
    layer.to(dtype)
    assert layer.router.proj.weight.dtype == dtype
    assert layer.router.bias_E.dtype == torch.float32
    assert layer.router.bias_E[0].item() == pytest.approx(0.1234567, abs=1e-8)


def test_from_meta():
    layer = fastmoe.MoE(2, 3, 1, d_hidden=2, router="loss_free", device="meta", dtype=torch.bfloat16)
    layer.to_empty(device="cpu")
    layer.reset_parameters()
    assert (layer.router.bias_E.dtype, bias(layer)) == (torch.float32, [0, 0, 0])
    layer(torch.ones(5, 2, dtype=torch.bfloat16)).sum().backward()
    torch.optim.SGD(layer.parameters(), lr=0.0).step()
    assert bias(layer) != [0, 0, 0]


def test_assigned_weights():
    """Meta device, then `load_state_dict(assign=True)`, here from a file in bfloat16: the module is told nothing."""
    layer, _ = one_expert()
    state = {name: tensor.bfloat16() for name, tensor in layer.state_dict().items()}
    with torch.device("meta"):
        assigned, _ = one_expert()
    assigned.load_state_dict(state, assign=True)
    assigned(torch.ones(5, 2, dtype=torch.bfloat16)).sum().backward()
    torch.optim.SGD(assigned.parameters(), lr=0.0).step()
    assert assigned.router.bias_E.dtype == torch.float32
    assert bias(assigned) == pytest.approx(AFTER_ONE)
    assert bias(assigned.to("cpu", torch.float64)) == pytest.approx(AFTER_ONE)


def test_steps_that_never_hold_the_router_are_told():
    layer, optimizer = one_expert()
    copies = torch.optim.SGD([p.detach().clone() for p in layer.parameters()], lr=0.0)
    layer(torch.ones(5, 2)).sum().backward()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(99):
            copies.step()
        optimizer.step()
        for _ in range(99):
            copies.step()
        layer(torch.ones(5, 2)).sum().backward()
    with pytest.warns(UserWarning, match="none of 100 optimizer steps held the router's parameters"):
        copies.step()
    assert bias(layer) == pytest.approx(AFTER_ONE)


@pytest.mark.parametrize("fused", [True, False])
def test_a_step_that_a_grad_scaler_skips(fused):
    layer, _ = one_expert()
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1, fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    scaler.scale(layer(torch.ones(5, 2)).sum()).backward()
    layer.experts.w1.grad.fill_(float("inf"))
    scaler.step(optimizer)
    scaler.update()
    assert bias(layer) == [0, 0, 0]
    optimizer.zero_grad()
    scaler.scale(layer(torch.ones(5, 2)).sum()).backward()
    scaler.step(optimizer)
    assert bias(layer) == pytest.approx(AFTER_ONE)


def test_scores_that_are_all_0():
    router = LossFreeRouter(1, 4, 2, sequence_loss_weight=0.5)
    router.proj.weight.data.fill_(-200.0)
    x_TD = torch.ones(3, 1, requires_grad=True)
    routing = router(x_TD)
    assert routing.weights_N.tolist() == [0.5] * 6
    (routing.weights_N.sum() + routing.losses["sequence_balance"]).backward()
    assert x_TD.grad.isfinite().all()
    assert router.proj.weight.grad.isfinite().all()


def test_compiled_counts_too():
    layer, optimizer = one_expert()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for num_tokens in (5, 7, 9):
        compiled(torch.ones(num_tokens, 2)).sum().backward()
    optimizer.step()
    assert bias(layer) == pytest.approx(AFTER_ONE)
    compiled(torch.ones(5, 2)).sum().backward()
    optimizer.step()
    assert bias(layer) == pytest.approx([-0.002, 0.002, 0.002])


def test_no_token():
    assert_silent_on_no_token(LossFreeRouter(4, 3, 2, sequence_loss_weight=0.5).double())
    layer, _ = one_expert()
    assert layer(torch.zeros(0, 5, 2)).shape == (0, 5, 2)


def test_a_bias_as_large_as_no_score_does_not_reach_the_weights():
    router = LossFreeRouter(2, 3, 1)
    router.proj.weight.data.zero_()
    router.bias_E.copy_(torch.tensor([0.0, 50.0, 0.0]))
    routing = router(torch.ones(4, 2), RoutingContext())
    assert routing.expert_ids_N.tolist() == [1] * 4
    assert routing.weights_N.tolist() == [0.5] * 4


@pytest.mark.parametrize("top_k", [1, 2])
def test_learns(top_k):
    assert_learns("loss_free", top_k)


@pytest.mark.parametrize(
    ("top_k", "options", "message"),
    [
        (1, {"normalize": True}, "with top_k=1 leave normalize out"),
        (2, {"normalize": "yes"}, "normalize must be True, False or None"),
        (2, {"bias_update_rate": -1}, "bias_update_rate must be a finite number >= 0"),
        (2, {"sequence_loss_weight": -1}, "sequence_loss_weight must be a finite number >= 0"),
        (2, {"num_groups": 2}, "num_groups must divide num_experts=5"),
        (2, {"aux_loss_weight": 0.1}, "unknown option of router 'loss_free' 'aux_loss_weight'"),
    ],
)
def test_bad_options(top_k, options, message):
    assert_refused("loss_free", top_k, options, message)
