"""A process that dies or hangs: the others end with an error, in time, that says where."""

import os
import signal
import time
from contextlib import ExitStack

import pytest
import torch.distributed as dist
from layout_cases import Case, batch, spread
from processes import answer_of, needs_gloo, started

pytestmark = needs_gloo

TIMEOUT, SLACK, PASSES = 10, 20, 3


def fail(how):
    if how == "dies":
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(1000)


def train_until_one_fails(case, how, where):
    """What the first process's pass ends with, and after how long; the second fails in the last pass."""
    model = spread(case)
    own = case.sequences(dist.get_rank())
    x, upstream, *_ = (whole[own.start : own.stop] for whole in batch(0, sum(case.shares)))
    for i in range(PASSES):
        if i == PASSES - 1 and dist.get_rank() == 1:
            if where == "forward":
                model.first.register_forward_hook(lambda *_: fail(how))
            else:
                model.moe.register_forward_hook(lambda *args: args[-1].register_hook(lambda _: fail(how)) and None)
        start = time.monotonic()
        try:
            (model(x) * upstream).sum().backward()
        except Exception as error:
            return type(error).__name__, str(error), time.monotonic() - start
    return "nothing", "", 0.0


def case_of(router, mesh=(("ep", 2),), **options):
    return Case(mesh, router, **{"shares": (4, 3)} | options)


SENT = case_of("no_losses", chunks=2)
CASES = {
    "dies_before_the_exchange": (SENT, "dies", "forward"),
    "dies_before_the_balance_loss": (case_of("topk"), "dies", "forward"),
    "dies_in_backward": (SENT, "dies", "backward"),
    "dies_before_suppressed": (case_of("no_losses", suppress_duplicates=True), "dies", "forward"),
    "dies_in_backward_suppressed": (case_of("no_losses", suppress_duplicates=True), "dies", "backward"),
    "dies_in_backward_fsdp": (case_of("no_losses", engine="fsdp"), "dies", "backward"),
    "dies_in_hidden": (case_of("no_losses", (("tp", 2),)), "dies", "forward"),
    "dies_in_slice": (case_of("no_losses", (("tp", 2),), tp="slice"), "dies", "forward"),
    "dies_in_backward_hidden": (case_of("no_losses", (("tp", 2),)), "dies", "backward"),
    "dies_with_experts_everywhere": (case_of("topk", (("dp", 2),)), "dies", "forward"),
    "dies_where_one_has_no_expert": (
        case_of("no_losses", num_experts=2, shares=(2, 2, 3), mesh=(("ep", 3),)),
        "dies",
        "forward",
    ),
    "hangs_before_the_exchange": (SENT, "hangs", "forward"),
    "hangs_before_the_balance_loss": (case_of("topk"), "hangs", "forward"),
    "hangs_in_backward": (SENT, "hangs", "backward"),
    "hangs_in_a_group_of_some": (case_of("no_losses", (("dp", 2), ("ep", 2)), shares=(4, 3, 2, 2)), "hangs", "forward"),
}


@pytest.fixture(scope="module")
def ends(request):
    """How the first process ended, of all cases at a time: most of it is waiting."""
    tested = [item for item in request.session.items if item.module is request.module]
    names = {item.callspec.params["name"] for item in tested}
    with ExitStack() as stack:
        running = {}
        for name in names:
            world = started(CASES[name][0].world, train_until_one_fails, *CASES[name], timeout=TIMEOUT, together=False)
            running[name] = stack.enter_context(world)
        yield {name: answer_of(*world[0], limit=120) for name, world in running.items()}


@pytest.mark.parametrize("name", CASES)
def test_the_other_ends_in_time_and_says_where(ends, name):
    returned, answer = ends[name]
    assert returned, answer
    kind, message, seconds = answer
    assert kind == "CollectiveError", answer
    assert "MoE layer 'moe'" in message
    if "ep" in dict(CASES[name][0].mesh) or CASES[name][0].tp == "slice":
        assert f"forward pass {PASSES}" in message
    assert seconds < TIMEOUT + SLACK
