"""`FasterGate` against a loop that decides token by token, on one process and on two."""

import plain_loops
import pytest
import torch
import worker_cases as cases
from helpers import assert_same
from processes import needs_gloo, run

from fmoe.gates import FasterGate, gen_faster_gate

T, D = 20, 5
X = torch.randn(T, D, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@pytest.fixture(autouse=True)
def _no_variables(monkeypatch):
    monkeypatch.delenv("FMOE_TOPO_GPUS_PER_NODE", raising=False)
    monkeypatch.delenv("FMOE_TOPO_OUTGOING_FRACTION", raising=False)


def token_by_token(logits_TE, node, each, per_node, allowed):
    """The experts of each token; `allowed` tokens may leave, the strongest pull first."""
    home = {e for e in range(logits_TE.shape[1]) if e // each // per_node == node}
    wanted = [sorted(range(len(row)), key=lambda e: -row[e].item())[:2] for row in logits_TE]
    pulls = {
        t: max(logits_TE[t, e].item() for e in ids if e not in home)
        for t, ids in enumerate(wanted)
        if not home.issuperset(ids)
    }
    leaving = sorted(pulls, key=lambda t: -pulls[t])[:allowed]
    at_home = [sorted(home, key=lambda e: -row[e].item())[:2] for row in logits_TE]
    return torch.tensor([wanted[t] if t in leaving or t not in pulls else at_home[t] for t in range(len(wanted))])


def loop(gate, x, node, each, per_node, allowed):
    """Choices, weights and, for one process, the loss."""
    logits = x @ gate.gate.weight.T + gate.gate.bias
    ids = token_by_token(logits, node, each, per_node, allowed)
    weights = torch.stack([row[chosen].softmax(0) for row, chosen in zip(logits, ids, strict=True)])
    first_T, total = logits.argmax(1), 0
    for e in range(logits.shape[1]):
        total = total + (first_T == e).double().mean() * logits.softmax(1)[:, e].mean()
    return ids, weights, logits.shape[1] * total


@pytest.mark.parametrize("node", [0, 1, 2])
@pytest.mark.parametrize(("fraction", "allowed"), [(0, 0), (0.15, 3), (0.29, 5), (0.7, 14), (1, 20)])
def test_against_a_loop(node, fraction, allowed):
    gate = FasterGate(D, 2, 5, node, workers_per_node=2, outgoing_fraction=fraction).double()
    chosen = []

    def function(x):
        ids, weights = gate(x)
        chosen.append(ids)
        return torch.cat([weights.reshape(-1), gate.get_loss().reshape(1)])

    def expected(x):
        ids, weights, loss = loop(gate, x, node, 2, 2, allowed)
        chosen.append(ids)
        return torch.cat([weights.reshape(-1), loss.reshape(1)])

    assert_same(plain_loops.outcome(function, gate, X), plain_loops.outcome(expected, gate, X))
    assert chosen[0].equal(chosen[1])
    assert (chosen[0] // 4 != node).any(dim=1).sum() == min(allowed, (gate(X)[0] // 4 != node).any(dim=1).sum())


def test_all_in_one_node_is_naive():
    gate = FasterGate(D, 4, 1, 0, outgoing_fraction=0.0)
    ids, weights = gate(X.float())
    expected = plain_loops.softmax_topk(gate.gate(X.float()), 2)
    assert ids.equal(expected[0])
    torch.testing.assert_close(weights, expected[1])


def test_equal_pulls_go_by_position():
    gate = FasterGate(D, 2, 2, 0, workers_per_node=1, outgoing_fraction=0.29)
    with torch.no_grad():
        gate.gate.weight.zero_()
        gate.gate.bias.copy_(torch.tensor([0.0, 1, 2, 3]))
    assert gate(torch.randn(100, D))[0].tolist() == [[3, 2]] * 29 + [[1, 0]] * 71


def test_no_token():
    assert FasterGate(D, 2, 2, 0, workers_per_node=1)(torch.zeros(0, D))[0].shape == (0, 2)


def test_the_variables_of_fastmoe_are_defaults(monkeypatch):
    gate = gen_faster_gate(9)(D, 2, 16)
    assert (gate.node_rank, gate.home, gate.outgoing_fraction) == (1, range(16, 32), 0.14)
    monkeypatch.setenv("FMOE_TOPO_GPUS_PER_NODE", "4")
    monkeypatch.setenv("FMOE_TOPO_OUTGOING_FRACTION", ".2")
    gate = gen_faster_gate(9)(D, 2, 16)
    assert (gate.node_rank, gate.home, gate.outgoing_fraction) == (2, range(16, 24), 0.2)
    gate = gen_faster_gate(9, workers_per_node=2, outgoing_fraction=1)(D, 2, 16)
    assert (gate.node_rank, gate.home, gate.outgoing_fraction) == (4, range(16, 20), 1)
    monkeypatch.setenv("FMOE_TOPO_GPUS_PER_NODE", "four")
    with pytest.raises(ValueError, match="FMOE_TOPO_GPUS_PER_NODE must be a whole number >= 1, got 'four'"):
        gen_faster_gate(9)(D, 2, 16)
    monkeypatch.setenv("FMOE_TOPO_OUTGOING_FRACTION", "14%")
    with pytest.raises(ValueError, match="FMOE_TOPO_OUTGOING_FRACTION must be a number from 0 to 1, got '14%'"):
        gen_faster_gate(9, workers_per_node=2)(D, 2, 16)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: gen_faster_gate(0)(D, 2, 16, 1), "top_k must be 2, got 1"),
        (lambda: FasterGate(D, 1, 4, 0, workers_per_node=1), "2 experts for tokens that stay, got 1 in node 0"),
        (lambda: FasterGate(D, 2, 4, 2, workers_per_node=2), "got 0 in node 2"),
        (lambda: FasterGate(D, 2, 4, -1), "node_rank must be a whole number"),
        (lambda: FasterGate(D, 2, 4, 0, workers_per_node=0), "workers_per_node must be a whole number >= 1"),
        (lambda: FasterGate(D, 2, 4, 0, outgoing_fraction=1.5), "from 0 to 1, got 1.5"),
    ],
)
def test_arguments_that_do_not_fit(make, words):
    with pytest.raises(ValueError, match=words):
        make()


@needs_gloo
def test_two_nodes_of_one_worker():
    lengths = [7, 12]
    answers = run(2, cases.run_faster, lengths, 0.26)
    layer = cases.whole_layer()
    x = torch.cat(cases.batch(lengths))
    whole_loss = loop(layer.gate, x, 0, cases.EACH, 1, 0)[2]
    for rank, (ids, out, loss) in enumerate(answers):
        mine = cases.batch(lengths)[rank]
        expected, weights, _ = loop(layer.gate, mine, rank, cases.EACH, 1, [1, 3][rank])
        assert ids.equal(expected)
        assert (ids // cases.EACH != rank).any(dim=1).sum() == [1, 3][rank]
        mixture = plain_loops.mixture(mine, ids, weights, plain_loops.mlps(layer))
        torch.testing.assert_close(out, mixture.detach(), rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(loss, whole_loss.detach(), rtol=1e-10, atol=1e-12)
