"""`FMoE` on two processes, against all experts in one process with the whole batch."""

import plain_loops
import pytest
import torch
import worker_cases as cases
from helpers import assert_same
from processes import needs_gloo, run

from fmoe import FMoETransformerMLP
from fmoe.gates import GShardGate

pytestmark = needs_gloo


def whole_outcome(layer, x, upstream):
    x = x.clone().requires_grad_()
    return cases.found(layer, x, layer(x), upstream)


def of_whole(parts):
    """Two workers' parameters by the names that they have where all experts are in one process; the gate's summed."""
    named = {name: sum(part[name] for part in parts) for name in parts[0] if name.startswith("gate.")}
    for rank, part in enumerate(parts):
        for name, grad in part.items():
            if name.startswith("experts."):
                number, rest = name.removeprefix("experts.").split(".", 1)
                named[f"experts.{rank * cases.EACH + int(number)}.{rest}"] = grad
    return named


@pytest.mark.parametrize("gate", cases.GATES)
@pytest.mark.parametrize("lengths", [[6, 3], [0, 5]])
def test_two_workers(gate, lengths):
    answers = run(2, cases.run_layer, lengths, gate)
    parts = [answer[0] for answer in answers]
    got = {name: torch.cat([part[name] for part in parts]) for name in ("out", "x")} | of_whole(parts)
    layer, x = cases.whole_layer(gate), torch.cat(cases.batch(lengths))
    seen = []
    layer.gate_hook = lambda ids, weights, _: seen.append(ids)
    assert_same(got, whole_outcome(layer, x, torch.cat(cases.batch(lengths, seed=1))))
    assert torch.cat([answer[1] for answer in answers]).equal(seen[0])
    if gate in ("dc", "switch"):
        assert (seen[0] == -1).any()


@pytest.mark.parametrize("gate", ["noisy", "gshard", "dc", "switch"])
def test_balance_losses_do_not_depend_on_the_number_of_workers(gate):
    lengths = [6, 3]
    answers = run(2, cases.run_layer, lengths, gate)
    layer = cases.whole_layer(gate)
    layer.gate(torch.cat(cases.batch(lengths)))
    loss = layer.gate.get_loss()
    loss.backward()
    for _, _, got, _ in answers:
        torch.testing.assert_close(got, loss.detach(), rtol=1e-10, atol=1e-12)
    grads = [answer[3] for answer in answers]
    assert_same({name: (grads[0][name] + grads[1][name]) / 2 for name in grads[0]}, cases.gradients(layer.gate))


def test_input_without_gradient_and_a_worker_without_tokens():
    parts = run(2, cases.run_without_input_gradient, [0, 5])
    layer = cases.whole_layer()
    layer(cases.batch([0, 5])[1]).sum().backward()
    assert_same(of_whole(parts), cases.gradients(layer))


@pytest.mark.parametrize("option", ["slice_group", "mp_group"])
def test_slices_of_one_input(option):
    length = 7
    parts = run(2, cases.run_slices, length, option)
    layer = cases.whole_layer(mask=torch.tensor([0, 1] + [0] * (length - 2)), mask_dict={1: 2.0})
    expected = whole_outcome(layer, cases.batch([length])[0], cases.batch([length], seed=1)[0])
    for part in parts:
        assert_same({name: part[name] for name in ("out", "x")}, {name: expected[name] for name in ("out", "x")})
    assert_same(of_whole(parts), {name: grad for name, grad in expected.items() if "." in name})


def test_structures():
    lengths = [4, 3]
    answers = run(2, cases.pairs_of_worker, lengths)
    layer = cases.pair_layer(cases.EACH * cases.WORLD, 1)
    for got, x in zip(answers, cases.batch(lengths), strict=True):
        for one, expected in zip(got, cases.run_pairs(layer, x), strict=True):
            torch.testing.assert_close(one, expected, rtol=1e-10, atol=1e-12)


def test_gshard_counts_each_workers_rows():
    gate = GShardGate(5, 2, 2, capacity=(0.5, 0.5), random_routing=False).double()
    with torch.no_grad():
        gate.gate.bias.copy_(torch.tensor([90.0, 60, 0, 0]))
    ids, _ = gate(cases.batch([6])[0])
    assert ids.tolist() == [[0, 1]] * 2 + [[-1, -1]] * 4


def test_swipe_moves_rows_to_workers_with_room():
    wanted = [[0, 1, 2, 0, 1], [1, 0, 0, 3, 1]]
    answers = run(2, cases.run_swipe, wanted, [5, 5], 1)
    assert answers[0][0].tolist() == wanted[0]  # four to worker 0, served first
    assert answers[1][0].tolist() == [1, 3, 3, 3, 3]  # one more has room there; the others move on
    assert [int(left) for _, left in answers] == [0, 0]


@pytest.mark.parametrize("top_k", [1, 2])
def test_swipe_gate(top_k):
    answers = run(2, cases.run_swipe_gate, 6, top_k)
    ids_GK = torch.cat([ids for ids, _, _ in answers])
    for worker in range(2):
        assert int((ids_GK // cases.EACH == worker).sum()) == 6 * top_k
    for ids, weights, logits in answers:
        shares = logits.softmax(1).gather(1, ids) if top_k == 1 else logits.gather(1, ids).softmax(1)
        torch.testing.assert_close(weights.detach(), shares)


def test_a_limit_over_all_workers():
    wanted, kept = [[0, 3, 0, 3, 3], [0, 0, 3, 1, -1]], [[0, 3, 0, 3, -1], [0, -1, -1, 1, -1]]
    answers = run(2, cases.run_limit, wanted, [[3, 5], [4, 2]])
    for rank, (sent, came, pruned) in enumerate(answers):
        assert pruned.tolist() == kept[rank]
        assert sent.tolist() == [kept[rank].count(e) for e in range(4)]
        assert came.tolist() == [worker.count(e) for worker in kept for e in (2 * rank, 2 * rank + 1)]


def test_a_copy_shares_the_groups():
    for shared, of_layer, of_copy in run(2, cases.run_copy):
        assert shared
        assert of_layer.equal(of_copy)


def test_more_workers_than_processes():
    layer = FMoETransformerMLP(2, 5, 7, world_size=2)
    with pytest.raises(ValueError, match=r"world_size=2 workers hold different experts, but there are 1 process"):
        layer(torch.randn(3, 5))


def test_plain_loops_agree_with_the_whole():
    layer, x = cases.whole_layer(), cases.batch([4])[0]
    choices = plain_loops.softmax_topk(layer.gate.gate(x), 2)
    expected = plain_loops.mixture(x, *choices, plain_loops.mlps(layer))
    torch.testing.assert_close(layer(x), expected, rtol=1e-10, atol=1e-12)
