"""The processes that Megatron-Core's tests run in."""

import os

import pytest
from megatron_models import batch, dense, gpt, loss_of
from megatron_processes import run


def test_layout_and_seed_are_those_asked_for(version):
    assert run(version, 4, _sizes, tp=2, ep=2, etp=1) == [(2, 2, 2, 1)] * 4


def _sizes():
    from megatron.core import parallel_state as state

    return (
        state.get_tensor_model_parallel_world_size(),
        state.get_data_parallel_world_size(),
        state.get_expert_model_parallel_world_size(),
        state.get_expert_tensor_parallel_world_size(),
    )


@pytest.mark.parametrize("fail", ["raises", "ends"])
def test_a_failing_process_is_reported_and_the_next_call_works(version, fail):
    expected = "ValueError: only here" if fail == "raises" else "process 1 of 2: it ended with exit code 3"
    with pytest.raises(AssertionError, match=expected):
        run(version, 2, _fails, fail)
    assert run(version, 2, os.getppid)


def _fails(how):
    import torch.distributed as dist

    if dist.get_rank() == 0:
        dist.barrier()  # which never comes
    if how == "ends":
        os._exit(3)
    raise ValueError("only here")


@pytest.mark.parametrize("make", [dense, gpt])
def test_forward_and_backward_on_one_process(version, make):
    (loss,) = run(version, 1, _loss, make)
    assert 3 < loss < 6


def _loss(make):
    loss = loss_of(make(), batch(0)).mean()
    loss.backward()
    return loss.item()
