"""`fmoe.functions` on one process and on two, against plain loops."""

import pytest
import torch
import worker_cases as cases
from processes import needs_gloo, run

from fmoe import functions

EXPERTS = cases.EACH * cases.WORLD
CHOICES = [[[0, 3], [2, -1], [3, 2]], [[-1, -1], [1, 0]]]


def check_counts(rank, each, choices, answer):
    """Positions in the order of experts, and counts, by looping over choices."""
    pos, (sent, came, counts, size), (no_pos, *lean), *_ = answer
    flat = [e for row in choices[rank] for e in row]
    assert pos.tolist() == [i for e in range(EXPERTS) for i, chosen in enumerate(flat) if chosen == e]
    assert sent.tolist() == [flat.count(e) for e in range(EXPERTS)]
    mine = range(rank * each, (rank + 1) * each)
    assert came.tolist() == [sum(row.count(e) for row in worker) for worker in choices for e in mine]
    assert counts.tolist() == [sum(row.count(e) for worker in choices for row in worker) for e in mine]
    assert size == sum(counts.tolist())
    assert no_pos is None
    assert lean[0].equal(sent)
    assert lean[1].equal(came)


def check_rows(rank, each, choices, answer):
    """Rows by expert, then worker; answers where the choices stood."""
    *_, rows, out, grad = answer
    arrived = [
        [100 * worker + t + 1]
        for e in range(rank * each, (rank + 1) * each)
        for worker, of_worker in enumerate(choices)
        for t, row in enumerate(of_worker)
        for chosen in row
        if chosen == e
    ]
    assert rows.tolist() == arrived
    expected = [[(100 * rank + t + 1) * (e + 1)] for t, row in enumerate(choices[rank]) for e in row]
    assert out.tolist() == expected  # (e + 1) is 0 where e is -1
    assert grad.tolist() == [[sum(e + 1 for e in row)] for row in choices[rank]]


def test_rows_out_and_back_on_one_process():
    answer = cases.run_functions(CHOICES[:1])
    check_counts(0, EXPERTS, CHOICES[:1], answer)
    check_rows(0, EXPERTS, CHOICES[:1], answer)


@needs_gloo
def test_rows_out_and_back_on_two_processes():
    for rank, answer in enumerate(run(2, cases.run_functions, CHOICES)):
        check_counts(rank, cases.EACH, CHOICES, answer)
        check_rows(rank, cases.EACH, CHOICES, answer)


@needs_gloo
@pytest.mark.parametrize("length", [6, 5, 1])
def test_slice_and_gather(length):
    answers = run(2, cases.run_slice_and_gather, length)
    x, upstream = torch.arange(float(length)), torch.arange(1.0, length + 1)
    assert torch.cat([part for part, _, _ in answers]).equal(x)
    for _, whole, grad in answers:
        assert whole.equal(x * x)
        assert grad.equal(2 * x * upstream)


def test_the_group_of_ensure_comm():
    functions.ensure_comm(torch.zeros(1), None)
    assert functions.get_moe_group() is None


def test_what_does_not_fit():
    with pytest.raises(ValueError, match="expert ids must lie in"):
        functions.count_by_gate(torch.tensor([0, 4]), 4, 1)
    with pytest.raises(ValueError, match="world_size=2 workers"):
        functions.prepare_forward(torch.tensor([0, 1]), 2, 2)
    with pytest.raises(ValueError, match="this is process 0 of 1 in the group, got rank=1, world_size=2"):
        functions.Slice.apply(torch.zeros(4, 2), 1, 2, None)
