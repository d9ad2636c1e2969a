"""`DistributedGroupedDataParallel`, against sums by hand and against one process with the whole batch."""

import copy

import data_parallel_cases as cases
import pytest
import torch
import worker_cases
from helpers import assert_same
from processes import needs_gloo, run
from torch import nn

import fmoe
from fmoe import DistributedGroupedDataParallel

GROUPS = {None: [[0, 1, 2]], "gate": [[0, 1, 2]], "none": [[0], [1], [2]], "pair": [[0], [1, 2]], "dp": [[0, 1, 2]]}


def members(tag, rank):
    return next(ranks for ranks in GROUPS[tag] if rank in ranks)


@needs_gloo
@pytest.mark.parametrize("need_sync", [True, False])
def test_parameters_come_from_the_first_of_their_group(need_sync):
    answers = run(3, cases.synced, need_sync)
    for rank, (_, after, same_buffer) in enumerate(answers):
        assert same_buffer
        for i, tag in enumerate(cases.TAGS):
            source = members(tag, rank)[0] if need_sync else rank
            assert after[i].equal(answers[source][0][i])


ALL = [True] * len(cases.TAGS)
SOME = [[True, False, True, False, True], [False, False, True, True, False], [True, False, False, False, True]]
NONE = [False] * len(cases.TAGS)


@needs_gloo
def test_gradients():
    tried = [
        (has_grad, options, torch.float64)
        for has_grad in ([ALL] * 3, SOME, [NONE, ALL, NONE], [NONE] * 3)
        for options in ({}, {"no_scale": True}, {"reduce_after": True})
    ]
    answers = run(3, cases.reduced, tried)
    for number, (_, options, _) in enumerate(tried):
        before = [answer[number][0] for answer in answers]
        for rank, answer in enumerate(answers):
            check_gradients(rank, before, answer[number][1], bool(options.get("no_scale")))


def check_gradients(rank, before, after, no_scale):
    for i, tag in enumerate(cases.TAGS):
        parts = [before[other][i] for other in members(tag, rank)]
        there = [part for part in parts if part is not None]
        if there:
            torch.testing.assert_close(after[i], sum(there) / (1 if no_scale else len(parts)))
        else:
            assert after[i] is None


@needs_gloo
def test_half_precision_is_summed_in_float32_if_asked_for():
    tried = [([ALL] * 3, {"fp32_allreduce": asked, "no_scale": True}, torch.bfloat16) for asked in (True, False)]
    answers = run(3, cases.reduced, tried)
    expected = sum(before[0].float() for (before, _), _ in answers).bfloat16()
    assert all(after[0].equal(expected) for (_, after), _ in answers)
    assert not answers[0][1][1][0].equal(expected)


@needs_gloo
def test_modules_and_groups_that_do_not_fit():
    words = "dp_comm='dp', got by rank 2 with 8 numbers, 2 with 12 numbers"
    assert [words in answer for answer in run(2, cases.different_modules)] == [True, True]
    assert run(2, cases.a_group_of_others) == [None, "gate_group must be a group that this process is in"]
    assert run(2, cases.a_sparse_gradient) == ["gradients must be dense, got torch.sparse_coo (4, 2)"] * 2


@needs_gloo
@pytest.mark.parametrize("gate", ["naive", "dc", "noisy"])
def test_training_on_two_pairs_is_training_on_one_process(gate):
    lengths, steps = [6, 3, 0, 5], 3
    answers = run(4, cases.two_pairs, lengths, gate, steps)
    model, seen = cases.whole_model(gate), []
    model.layer.gate_hook = lambda ids, weights, _: seen.append(ids)

    def mean_over_workers():
        for p in model.parameters():
            p.grad = None if p.grad is None else p.grad / 4

    pairs = torch.cat(worker_cases.batch(lengths)).split([9, 5])  # a gate's batch, and its loss, are of a pair
    expected = cases.train(model, pairs, steps, 2.0, mean_over_workers, model.parameters())
    for rank, (choices, parameters) in enumerate(answers):
        assert_same(parameters, of_worker(expected, rank % 2))
        whole = [torch.cat(of_both) for of_both in zip(choices, answers[rank ^ 1][0], strict=True)]
        if rank % 2 == 0:
            assert all(one.equal(other) for one, other in zip(whole, seen[rank // 2 :: 2], strict=True))


def of_worker(expected, rank):
    named = {}
    for name, value in expected.items():
        if ".experts." in name:
            number, rest = name.removeprefix("layer.experts.").split(".", 1)
            if int(number) // worker_cases.EACH != rank:
                continue
            name = f"layer.experts.{int(number) % worker_cases.EACH}.{rest}"
        named[f"module.{name}"] = value
    return named


@needs_gloo
def test_copies_of_all_experts_as_with_pytorchs_own_wrapper():
    lengths = [6, 3]
    layer, x = worker_cases.whole_layer(), torch.cat(worker_cases.batch(lengths))
    (layer(x).square().sum() / 2).backward()
    for pytorchs, ours in run(2, cases.both_data_parallel_ways, lengths):
        assert_same(ours, pytorchs)
        assert_same(ours, worker_cases.gradients(layer))


def test_one_process_without_a_group():
    module = fmoe.FMoETransformerMLP(3, 4, 8)
    model, x = DistributedGroupedDataParallel(module, dp_group=None), torch.randn(5, 4)
    assert model(x).equal(module(inp=x))
    assert model.state_dict().keys() == {f"module.{name}" for name in module.state_dict()}
    model(x).sum().backward()
    before = {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}
    model.allreduce_params()
    assert_same({name: p.grad for name, p in model.named_parameters()}, before)
    assert copy.deepcopy(model)(x).equal(model(x))


def test_arguments_that_do_not_fit():
    with pytest.raises(ValueError, match="unknown arguments need_synk, dp_comm: groups are given as <name>_group="):
        DistributedGroupedDataParallel(nn.Linear(2, 2), need_synk=True, dp_comm=None)
    with pytest.raises(ValueError, match="auto_allreduce must be False"):
        DistributedGroupedDataParallel(nn.Linear(2, 2), True)
