"""How the processes are laid out never changes the numbers: dp, ep, DDP or FSDP, whoever has which tokens."""

import itertools

import pytest
from layout_cases import Case, assert_as_one
from processes import needs_gloo

pytestmark = needs_gloo

ROUTERS = ["topk", "switch", "noisy_topk", "expert_choice", "soft", "loss_free"]
KINDS = ["stacked", "gated", "modules", "mixed"]
LAYOUTS = [(1, 1), (2, 1), (1, 2), (4, 1), (2, 2), (1, 4)]
ENGINES = ["ddp", "fsdp"]
SHARES = {1: (7,), 2: (5, 2), 4: (3, 2, 0, 2)}
EXPERTS = {1: 5, 2: 5, 4: 7}


def case_of(dp, ep, **options):
    size = dp * ep
    return Case((("dp", dp), ("ep", ep)), **{"shares": SHARES[size], "num_experts": EXPERTS[size]} | options)


def param(case, slow=False):
    return pytest.param(case, id=str(case), marks=[pytest.mark.slow] if slow else [])


def product():
    """Everything with everything; the default run has each router on each layout with each engine."""
    numbers = itertools.product(*(range(len(names)) for names in (LAYOUTS, ROUTERS, KINDS, ENGINES)))
    for layout, router, kind, engine in numbers:
        dp, ep = LAYOUTS[layout]
        case = case_of(dp, ep, router=ROUTERS[router], kind=KINDS[kind], engine=ENGINES[engine])
        yield param(case, slow=(layout + router + kind + 2 * engine) % 4 != 0)


def ways_to_send():
    """Chunks, duplicate suppression and both."""
    options = [
        {"chunks": 3},
        {"suppress_duplicates": True},
        {"chunks": 3, "suppress_duplicates": True},
    ]
    models = [("topk", "stacked"), ("switch", "modules"), ("expert_choice", "gated"), ("soft", "mixed")]
    for i, (dp, ep) in enumerate([(1, 2), (2, 2), (1, 4)]):
        for j, (router, kind) in enumerate(models):
            for k, option in enumerate(options):
                case = case_of(dp, ep, router=router, kind=kind, engine=ENGINES[(i + j + k) % 2], **option)
                yield param(case, slow=(i + j + k) % 2)


def one_without_experts():
    """5 experts over 4 processes: 2, 2, 1 and none."""
    both = {"chunks": 2, "suppress_duplicates": True}
    for i, router in enumerate(ROUTERS):
        for j, kind in enumerate(KINDS):
            options = {"router": router, "kind": kind, "engine": ENGINES[(i + j) % 2], "num_experts": 5}
            yield param(case_of(1, 4, **options, **both if j == 3 else {}), slow=(i - j) % 4)


def odd_ones():
    for i, (size, name) in enumerate(itertools.product((2, 4), ("dp", "ep"))):
        for engine in ENGINES:
            case = Case(((name, size),), kind="mixed", shares=SHARES[size], num_experts=8, engine=engine)
            yield param(case, slow=size == 4 and engine == ENGINES[i % 2])
    models = [
        {"kind": "gated", "chunks": 2, "tokens": "one"},
        {"kind": "constant", "tokens": "one"},
        {"kind": "stacked", "tokens": "nobody"},
        {"kind": "modules", "tokens": "nobody", "chunks": 2},
        {"router": "choosy"},
        {"router": "choosy", "kind": "mixed"},
        {"kind": "constant"},
        {"kind": "frozen"},
        {"kind": "prelu"},
        {"model": "first"},
        {"model": "first", "kind": "constant"},
        {"model": "blocks", "kind": "gated"},
        {"router": "no_losses", "micro_steps": 2},
        {"router": "no_losses", "micro_steps": 2, "kind": "modules"},
    ]
    for i, (dp, ep) in enumerate([(2, 1), (1, 2), (2, 2)]):
        none = (0,) * (dp * ep)
        shares = {"all": SHARES[dp * ep], "one": (5, *none[1:]), "nobody": none}
        for j, options in enumerate(models):
            for k, engine in enumerate(ENGINES):
                given = {"tokens": "all", "suppress_duplicates": dp == 2, "engine": engine} | options
                case = case_of(dp, ep, shares=shares[given.pop("tokens")], **given)
                yield param(case, slow=(i + j + k) % 2 or (i == 0 and j < 9))


CASES = [*product(), *ways_to_send(), *one_without_experts(), *odd_ones()]


@pytest.mark.parametrize("case", CASES)
def test_training_is_that_of_one_process(trained, case):
    assert_as_one(case, trained(case))
