"""The gates on one process, against plain loops over tokens."""

import math

import plain_loops
import pytest
import torch
from helpers import assert_same

import fmoe
from fmoe import gates
from fmoe.gates.swipe_gate import share_out
from fmoe.gates.utils import limit_by_capacity

T, D, E = 11, 5, 4
X = torch.randn(T, D, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
TOP_TWO = (gates.GShardGate, gates.DCGate)


def build(cls, *args, train=True, **options):
    torch.manual_seed(3)
    gate = cls(D, E, 1, *args, **options).double().train(train)
    torch.manual_seed(5)
    return gate


def pruned(ids_TK, capacity):
    """First choices of all tokens are served before second ones."""
    kept, taken = ids_TK.clone(), [0] * E
    for k in range(ids_TK.shape[1]):
        for t in range(len(ids_TK)):
            expert = int(ids_TK[t, k])
            taken[expert] += 1
            if taken[expert] > capacity:
                kept[t, k] = -1
    return kept


def balance(shares_TE, first_T):
    """`E * sum of f_e * P_e`."""
    total = 0
    for e in range(E):
        total = total + first_T.eq(e).double().mean() * shares_TE[:, e].mean()
    return E * total


def with_loss(gate):
    """Weights and loss of a gate as one tensor, and, aside, its choices."""
    chosen = []

    def function(x):
        torch.manual_seed(5)
        ids, weights = gate(x)
        chosen.append(ids)
        return torch.cat([weights.reshape(-1), gate.get_loss().reshape(1)])

    return function, chosen


@pytest.mark.parametrize("cls", TOP_TWO)
@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("capacity", [(1.2, 2.4), (0.5, 0.7)])
def test_two_experts_with_a_capacity(cls, train, capacity):
    gate = build(cls, capacity=capacity, train=train)
    function, chosen = with_loss(gate)
    expected_ids = []

    def loop(x):
        logits = x @ gate.gate.weight.T + gate.gate.bias
        ids, weights = plain_loops.softmax_topk(logits, 2)
        kept = pruned(ids, math.ceil(capacity[0 if train else 1] * 2 * T / E - 1e-9))
        torch.manual_seed(5)
        if train:
            kept[2 * weights[:, 1] < torch.rand(T, dtype=torch.float64), 1] = -1
        expected_ids.append(kept)
        return torch.cat([weights.reshape(-1), balance(logits.softmax(1), ids[:, 0]).reshape(1)])

    assert_same(plain_loops.outcome(function, gate, X), plain_loops.outcome(loop, gate, X))
    assert chosen[0].equal(expected_ids[0])
    assert (chosen[0] == -1).any() == (train or capacity[1] < 1)


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("capacity", [(1.2, 2.4), (0.5, 0.7)])
def test_switch(train, capacity):
    gate = build(gates.SwitchGate, capacity=capacity, train=train)
    function, chosen = with_loss(gate)
    expected_ids = []

    def loop(x):
        torch.manual_seed(5)
        jittered = x * (0.9 + 0.2 * torch.rand(T, D, dtype=torch.float64)) if train else x
        logits = jittered @ gate.gate.weight.T + gate.gate.bias
        ids, weights = plain_loops.softmax_topk(logits, 1)
        expected_ids.append(pruned(ids, math.ceil(capacity[0 if train else 1] * T / E - 1e-9)))
        return torch.cat([weights.reshape(-1), balance(logits.softmax(1), ids[:, 0]).reshape(1)])

    assert_same(plain_loops.outcome(function, gate, X), plain_loops.outcome(loop, gate, X))
    assert chosen[0].equal(expected_ids[0])


def squared_variation(load_E):
    return load_E.var() / (load_E.mean() ** 2 + 1e-10)


@pytest.mark.parametrize("top_k", [1, 2, E])
@pytest.mark.parametrize("train", [True, False])
def test_noisy(top_k, train):
    gate = build(gates.NoisyGate, top_k, train=train)
    function, chosen = with_loss(gate)

    def loop(x):
        clean, std = x @ gate.w_gate, torch.nn.functional.softplus(x @ gate.w_noise) + 0.01
        torch.manual_seed(5)
        noisy = clean + torch.randn(T, E, dtype=torch.float64) * std if train else clean
        ids, weights = plain_loops.softmax_topk(noisy, top_k)
        assert chosen[0].equal(ids)
        importance = torch.stack([(weights * (ids == e)).sum() for e in range(E)])
        loss = squared_variation(importance)
        if train and top_k < E:
            load = [sum(chance(clean[t], noisy[t], std[t], e, top_k) for t in range(T)) for e in range(E)]
            loss = loss + squared_variation(torch.stack(load))
        elif not train:
            loss = loss + squared_variation(torch.stack([(ids == e).double().sum() for e in range(E)]))
        return torch.cat([weights.reshape(-1), loss.reshape(1)])

    assert_same(plain_loops.outcome(function, gate, X), plain_loops.outcome(loop, gate, X))


def chance(clean_E, noisy_E, std_E, e, top_k):
    """That expert e beats the k-th best of the others under new noise of its own."""
    others = [noisy_E[other] for other in range(E) if other != e]
    kth = sorted(others, key=lambda value: -value.item())[top_k - 1]
    return torch.special.ndtr((clean_E[e] - kth) / std_E[e])


def test_zero():
    ids, weights = build(gates.ZeroGate, 3)(X)
    assert ids.equal(torch.zeros(T, 3, dtype=torch.int64))
    assert weights.equal(torch.full((T, 3), 1 / 3, dtype=torch.float64))


@pytest.mark.parametrize("top_k", [1, 2])
@pytest.mark.parametrize("train", [True, False])
def test_swipe_on_one_process_is_naive(top_k, train):
    swipe, naive = build(gates.SwipeGate, top_k, train=train), build(gates.NaiveGate, top_k)
    for got, expected in zip(swipe(X), naive(X), strict=True):
        assert got.equal(expected)
    assert not swipe.has_loss


@pytest.mark.parametrize("seed", range(20))
def test_swipe_shares_room_one_row_at_a_time(seed):
    generator = torch.Generator().manual_seed(seed)
    asked = torch.randint(0, 5, (4, 4), generator=generator)
    room = torch.bincount(torch.randint(0, 4, (int(asked.sum()) + seed % 3,), generator=generator), minlength=4)
    served, moved, left = torch.zeros_like(asked), torch.zeros_like(asked), room.tolist()
    for source in range(4):
        for worker in range(4):
            for _ in range(int(asked[source, worker])):
                if left[worker] > 0:
                    served[source, worker] += 1
                    left[worker] -= 1
    for source in range(4):
        for _ in range(int((asked - served)[source].sum())):
            worker = next(worker for worker in range(4) if left[worker] > 0)
            moved[source, worker] += 1
            left[worker] -= 1
    got = share_out(asked, room)
    for one, expected in zip(got, (served, moved, torch.tensor(left)), strict=True):
        assert one.equal(expected)


def test_limit_by_capacity():
    ids = torch.tensor([[0, 1], [0, 2], [-1, 0], [2, 0], [1, -1]])
    for capacity, kept in (
        (2, [[0, 1], [0, 2], [-1, -1], [2, -1], [1, -1]]),
        (torch.tensor([3, 0, 1]), [[0, -1], [0, 2], [-1, 0], [-1, -1], [-1, -1]]),
        (0, [[-1, -1]] * 5),
    ):
        sent, came, pruned = limit_by_capacity(ids, 3, 1, capacity)
        assert pruned.tolist() == kept
        assert sent.tolist() == came.tolist() == [sum(row.count(e) for row in kept) for e in range(3)]


@pytest.mark.parametrize(
    "cls", [gates.NaiveGate, gates.NoisyGate, gates.GShardGate, gates.DCGate, gates.SwipeGate, gates.ZeroGate]
)
def test_in_a_layer(cls):
    layer = fmoe.FMoETransformerMLP(E, D, 7, gate=cls).double()
    chosen = []
    layer.gate_hook = lambda ids, weights, _: chosen.append((ids, weights))
    got = plain_loops.outcome(layer, layer, X)
    ids, weights = chosen[0]
    expected = plain_loops.mixture(X, ids, weights, plain_loops.mlps(layer))
    torch.testing.assert_close(got["out"], expected.detach(), rtol=1e-10, atol=1e-12)


def test_switch_in_a_layer():
    layer = fmoe.FMoETransformerMLP(E, D, 7, gate=lambda *args: gates.SwitchGate(*args, capacity=(0.5, 0.5)), top_k=1)
    layer(X.float()).sum().backward()
    assert layer.gate.gate.weight.grad.any()


def test_losses_are_kept_and_cleared():
    gate = build(gates.GShardGate)
    assert not gate.has_loss
    gate(X)
    assert gate.has_loss
    assert gate.get_loss(clear=False) is gate.get_loss()
    assert gate.get_loss() is None
    assert build(gates.NaiveGate)(X, return_all_scores=True)[2].shape == (T, E)


def test_an_even_load_costs_one():
    gate = build(gates.GShardGate)
    torch.nn.init.zeros_(gate.gate.weight)
    torch.nn.init.zeros_(gate.gate.bias)
    gate(X)
    assert float(gate.get_loss().detach()) == pytest.approx(1)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: gates.GShardGate(D, E, 1, 1), "topk must be 2, got 1"),
        (lambda: gates.SwitchGate(D, E, 1, 2), "topk must be 1, got 2"),
        (lambda: gates.SwitchGate(D, E, 1, capacity=1.2), "two numbers"),
        (lambda: gates.NoisyGate(D, E, 1, 5), "number of experts, 4, got 5"),
    ],
)
def test_arguments_that_do_not_fit(make, words):
    with pytest.raises(ValueError, match=words):
        make()


def test_a_gate_must_define_forward():
    with pytest.raises(NotImplementedError, match="BaseGate must define forward"):
        gates.BaseGate(E, 1)(X)
