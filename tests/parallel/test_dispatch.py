"""What an expert-parallel layer sends, when it sends it, and that it does so whatever is to be differentiated."""

from contextlib import contextmanager
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from layout_cases import Case, assert_as_one, assert_close, batch, build, mesh_of, spread
from processes import needs_gloo, run
from torch import nn

import fastmoe
from fastmoe.dispatch.exchange import Exchange
from fastmoe.parallel import Layout, shard_layer

pytestmark = needs_gloo

D, E, K = 32, 5, 2


class Still(nn.Module):
    """An expert whose output does not depend on its input."""

    def forward(self, rows_ND):
        return torch.ones_like(rows_ND)


@contextmanager
def wire():
    """Collects what leaves this process for another inside it."""
    sent = []
    exchange = dist.all_to_all_single

    def all_to_all_single(out, tensor, *args, **kwargs):
        sent.append(tensor.detach().clone())
        return exchange(out, tensor, *args, **kwargs)

    with patch.object(dist, "all_to_all_single", all_to_all_single):
        yield sent


def whole_layer(num_experts=E, dtype=torch.float64, **options):
    torch.manual_seed(0)
    own = {} if "expert" in options else {"d_hidden": 8}
    return fastmoe.MoE(D, num_experts, K, dtype=dtype, **own, **options)


def layer_over(group_size, chunks=1, suppress_duplicates=False, **options):
    layer = whole_layer(**options)
    layout = Layout(mesh_of((("ep", group_size),)))
    shard_layer(layer, layout, chunks=chunks, suppress_duplicates=suppress_duplicates)
    return layer


def tokens_of(rank, number, dtype=torch.float64):
    return torch.randn(2, number, D, generator=torch.Generator().manual_seed(rank), dtype=torch.float64).to(dtype)


def sent_by(numbers, dtype, autocast, options):
    """Bytes of floating numbers, how many integers in how many exchanges, and (token, expert) of each routed row."""
    rank = dist.get_rank()
    layer = layer_over(len(numbers), dtype=dtype, **options)
    routed = []
    layer.router.register_forward_hook(lambda router, args, routing: routed.append(routing))
    x, upstream = tokens_of(rank, numbers[rank], dtype)
    with wire() as sent, torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y = layer(x.requires_grad_())
        (y * upstream).sum().backward()
    floats = [t for t in sent if t.is_floating_point()]
    integers = [t for t in sent if not t.is_floating_point()]
    rows = torch.stack([routed[0].token_ids_N, routed[0].expert_ids_N], 1).tolist()
    return sum(t.nbytes for t in floats), sum(t.numel() for t in integers), len(integers), rows


UNEVEN = {2: (5, 2), 4: (16, 12, 0, 20)}


def elsewhere(rows, rank, world):
    """Rows whose expert another process holds: (token, process)."""
    each = -(-E // world)
    return [(token, expert // each) for token, expert in rows if expert >= 0 and expert // each != rank]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("world", "chunks"), [(2, 1), (2, 3), (4, 1)])
def test_each_row_for_another_process_travels_four_times(world, chunks, dtype):
    by_rank = run(world, sent_by, UNEVEN[world], dtype, False, {"chunks": chunks})
    rows = sum(len(elsewhere(found[3], rank, world)) for rank, found in enumerate(by_rank))
    assert rows > 0
    assert sum(found[0] for found in by_rank) == rows * 4 * D * dtype.itemsize


def test_under_autocast_rows_travel_in_its_dtype():
    by_rank = run(2, sent_by, UNEVEN[2], torch.float32, True, {})
    rows = sum(len(elsewhere(found[3], rank, 2)) for rank, found in enumerate(by_rank))
    assert sum(found[0] for found in by_rank) == rows * 4 * D * 2


@pytest.mark.parametrize("world", [2, 4])
def test_an_even_load_travels_as_the_formula_says(world):
    tokens = 8
    by_rank = run(world, sent_by, (tokens,) * world, torch.float32, False, {"router": "round_robin", "num_experts": 8})
    batch = tokens * world
    assert sum(found[0] for found in by_rank) == 4 * K * batch * D * 4 * (world - 1) // world


@pytest.mark.parametrize(("world", "chunks"), [(2, 1), (2, 3), (4, 2)])
def test_the_numbers_of_rows_are_exchanged_once(world, chunks):
    """For all chunks together; to each process go the numbers of rows for its experts."""
    each = -(-E // world)
    by_rank = run(world, sent_by, UNEVEN[world], torch.float32, False, {"chunks": chunks})
    for rank, (_, numbers, exchanges, _) in enumerate(by_rank):
        held = range(E)[rank * each : (rank + 1) * each]
        assert numbers == (E - len(held)) * chunks
        assert exchanges == 1


@pytest.mark.parametrize(("world", "chunks"), [(2, 1), (2, 3), (4, 1)])
def test_duplicates_travel_once(world, chunks):
    """A token's weights travel one by one, there and (their gradients) back."""
    options = {"chunks": chunks, "suppress_duplicates": True}
    by_rank = run(world, sent_by, UNEVEN[world], torch.float32, False, options)
    rows = [elsewhere(found[3], rank, world) for rank, found in enumerate(by_rank)]
    assert sum(map(len, rows)) > sum(len(set(own)) for own in rows)
    expected = sum(len(set(own)) * 4 * D * 4 + len(own) * 2 * 4 for own in rows)
    assert sum(found[0] for found in by_rank) == expected < sum(map(len, rows)) * 4 * D * 4


DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def passes(model, x, upstream):
    y = model(x.requires_grad_())
    (y * upstream).sum().backward()
    return {"y": y.detach(), "x": x.grad} | {name: p.grad for name, p in model.named_parameters()}


NO_LOSSES = {"router_options": {"aux_loss_weight": 0.0}}


def passes_in(dtype, numbers, options):
    layer = layer_over(2, **options, **NO_LOSSES).to(dtype)
    return passes(layer, *tokens_of(dist.get_rank(), numbers[dist.get_rank()]).to(dtype))


def alone_in(dtype, like, numbers):
    """In `dtype` on one process, from what `like` makes of parameters and tokens."""
    layer = whole_layer(**NO_LOSSES).to(like).to(dtype)
    whole = torch.cat([tokens_of(rank, number) for rank, number in enumerate(numbers)], 1).to(like).to(dtype)
    return passes(layer, *whole)


@pytest.mark.parametrize("options", [{}, {"chunks": 2, "suppress_duplicates": True}], ids=["plain", "suppress"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype_is_as_exact_as_on_one_process(dtype, options):
    numbers = (40, 24)
    exact, single = (alone_in(computed, dtype, numbers) for computed in (torch.float64, dtype))
    by_rank = run(2, passes_in, dtype, numbers, options)
    for name, truth in exact.items():
        if name in ("y", "x"):
            got = torch.cat([found[name] for found in by_rank])
        elif "experts" in name:  # means over the processes
            got = torch.cat([found[name] for found in by_rank]) * 2
        else:
            got = sum(found[name].double() for found in by_rank)
        error, usual = ((value.double() - truth).norm() for value in (got, single[name]))
        floor = torch.finfo(dtype).eps / 4 * truth.norm()
        assert error <= 2 * usual + floor, name


RUN_AGAIN = [
    Case(mesh, kind=kind, shares=(5, 2), engine=engine, model="checkpointed")
    for mesh, engine in [((("ep", 2),), "ddp"), ((("dp", 1), ("ep", 2)), "fsdp")]
    for kind in ("stacked", "mixed")
]


@pytest.mark.parametrize("case", RUN_AGAIN, ids=str)
def test_the_layer_is_run_again_in_backward(trained, case):
    assert_as_one(case, trained(case))


def compiled(case):
    own = case.sequences(dist.get_rank())
    x, upstream, *_ = (whole[own.start : own.stop] for whole in batch(0, 7))
    found = []
    for backend in (None, "eager"):
        model = spread(case)
        if backend:
            model.compile(backend=backend)
        found.append(passes(model, x.clone(), upstream))
    return found


def test_compiled():
    """Around the exchange the graph breaks."""
    for plain, through_the_compiler in run(2, compiled, Case((("ep", 2),), shares=(5, 2), chunks=2)):
        assert_close(through_the_compiler, plain, "compiled")


def evaluate(modes):
    model = spread(Case((("ep", 2),), kind="gated", shares=(5, 2))).eval()
    x = tokens_of(dist.get_rank(), 3)[0, :, :6]
    outputs = []
    for mode in modes:
        with wire() as sent, mode():
            outputs.append(model(x).detach().clone())
        assert sent
    return outputs


def test_evaluation():
    modes = [torch.enable_grad, torch.no_grad, torch.inference_mode]
    model = build(*Case(()).alone[:1], "gated", *Case(()).alone[2:]).eval()
    for rank, outputs in enumerate(run(2, evaluate, modes)):
        expected = model(tokens_of(rank, 3)[0, :, :6]).detach()
        for output in outputs:
            assert_close(output, expected, "output")


def differentiate(options):
    """Gradients of the input where only one process, or none, wants one, and nothing else is trained."""
    found = {}
    for wanted in ([True, False], [False, True], [False, False]):
        layer = layer_over(2, **options, **NO_LOSSES).requires_grad_(False)
        x, upstream = tokens_of(dist.get_rank(), 5)
        x.requires_grad_(wanted[dist.get_rank()])
        y = layer(x)
        if y.requires_grad:
            (y * upstream).sum().backward()
        found[tuple(wanted)] = x.grad
    return found


@pytest.mark.parametrize(
    "options",
    [{}, {"chunks": 3, "suppress_duplicates": True}, {"expert": [nn.Identity, Still, Still, nn.Identity, Still]}],
)
def test_only_some_want_gradients(options):
    whole = {name: value for name, value in options.items() if name == "expert"}
    layer = whole_layer(**whole, **NO_LOSSES).requires_grad_(False)
    for rank, found in enumerate(run(2, differentiate, options)):
        x, upstream = tokens_of(rank, 5)
        (layer(x.requires_grad_()) * upstream).sum().backward()
        for wanted, grad in found.items():
            assert (grad is not None) == wanted[rank]
            if wanted[rank]:
                assert_close(grad, x.grad, f"{wanted}")


def events_of(options):
    """What happens in one pass forward and backward, in order."""
    layer = layer_over(2, chunks=3, **options)
    events, names = [], {}
    pipeline, mix = layer.dispatcher._pipeline, layer.experts.mix

    def noted_pipeline(x_TD, parcels, compute):
        names.update({id(exchange): f"{way} {c}" for c, p in enumerate(parcels) for way, exchange in ways(p)})
        return pipeline(x_TD, parcels, compute)

    def ways(parcel):
        return ("there", parcel.there), ("back", parcel.back)

    def noted(method):
        def call(exchange, *args):
            if id(exchange) in names:
                events.append(f"{args[-1]} {names[id(exchange)]}")
            return method(exchange, *args)

        return call

    def noted_mix(*args):
        c = sum(event.startswith("computing") for event in events)
        events.append(f"computing {c}")
        y_RO = mix(*args)
        y_RO.register_hook(lambda grad: events.append(f"differentiating {c}"))
        return y_RO

    layer.dispatcher._pipeline, layer.experts.mix = noted_pipeline, noted_mix
    x, upstream = tokens_of(dist.get_rank(), 9)
    with (
        patch.object(Exchange, "launch", noted(Exchange.launch)),
        patch.object(Exchange, "wait", noted(Exchange.wait)),
    ):
        (layer(x.requires_grad_()) * upstream).sum().backward()
    return events


@pytest.mark.parametrize("suppress_duplicates", [False, True])
@pytest.mark.parametrize("kind", ["stacked", "modules"])
def test_rows_travel_while_others_are_computed(kind, suppress_duplicates):
    options = {"expert": nn.Linear(D, D)} if kind == "modules" else {}
    for events in run(2, events_of, {"suppress_duplicates": suppress_duplicates, **options}):
        assert len(events) == len(set(events)) == 3 * 10, events

        def in_order(*expected, events=events):
            assert sorted(expected, key=events.index) == list(expected), events

        for c in (0, 1):
            in_order(f"sending rows there {c + 1}", f"computing {c}", f"receiving rows there {c + 1}")
            in_order(f"sending rows back {c}", f"computing {c + 1}", f"receiving rows back {c}")
            here = f"differentiating {c + 1}"
            in_order(f"sending gradients back {c}", here, f"receiving gradients back {c}")
            here = f"differentiating {c}"
            in_order(f"sending gradients there {c + 1}", here, f"receiving gradients there {c + 1}")
