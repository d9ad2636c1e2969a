"""What `fastmoe tune` computes, and the gate before it times. Triton's interpreter serves where there is no GPU."""

import dataclasses

import pytest
import torch

pytest.importorskip("triton")

from fastmoe.kernels.triton.tiles import KINDS, Problem, Tile, default_tile
from fastmoe.tune import measure as measuring
from fastmoe.tune import problems
from fastmoe.tune.measure import CLEARLY_FASTER, LEAST_ROUNDS, Outcome, check, fastest, named, rounds
from fastmoe.tune.problems import Case, cases
from fastmoe.tune.run import default_device
from fastmoe.tune.truth import truth, worst_error
from fastmoe.tune.work import Work

DEVICE = default_device()
T, E, D, H, K = 5, 3, 16, 32, 2
LARGE = Tile(32, 64, 32, group=2, warps=4, stages=2)
NEVER = float("inf")


def case(kind, activation="gelu", of_w1=False, dtype=torch.float32):
    gated = activation == "swiglu"
    W = H * (1 + gated)
    sizes = {"forward": (W, D), "turned": (W, D), "product": (D, H), "backward": (D, H)}
    outputs, inputs = (W, D) if of_w1 else sizes.get(kind, (D, H))
    gated = gated and kind in ("forward", "backward")
    return Case(Problem(kind, dtype, T * K, E, outputs, inputs, gated), activation, D, K)


ALL = [
    case("forward"), case("forward", "swiglu"), case("product"), case("turned"), case("turned", "swiglu"),
    case("backward"), case("backward", "swiglu"), case("weight"), case("weight", "swiglu", of_w1=True),
]  # fmt: skip


@pytest.mark.parametrize("each", ALL, ids=lambda each: f"{each.problem.key} {each.activation}")
@pytest.mark.parametrize("keep", [True, False], ids=["trained", "decoded"])
def test_every_way_gives_the_truth(each, keep, monkeypatch):
    if keep:
        monkeypatch.setattr(problems, "DECODE_ROWS", 0)
    work = Work(each, DEVICE)
    expected = truth(work)
    assert len(expected) == {"forward": 1 + keep, "backward": 3}.get(each.problem.kind, 1)
    tiles = [LARGE, default_tile(each.problem, "cpu"), dataclasses.replace(LARGE, depth=16, split=2)]
    ways = tiles if DEVICE.type == "cuda" else [*tiles, None]  # on a GPU F.grouped_mm is for bfloat16
    right, failed, wrong = check(work, ways, NEVER)
    assert (right, failed, wrong) == (ways, 0, [])


def test_the_truth_is_not_the_same_for_all():
    """Of two kinds that multiply the same tensors, one result is not mistaken for the other's."""
    product, turned = (Work(case(kind), DEVICE) for kind in ("product", "turned"))
    assert worst_error(product.by(LARGE), [2 * t for t in truth(product)]) > 0.4
    assert product.by(LARGE)[0].shape == turned.by(LARGE)[0].shape == (T, D)
    assert worst_error(product.by(LARGE), truth(turned)) > 0.4


@pytest.mark.parametrize(
    "damage",
    [
        lambda y: y[-1].zero_(),
        lambda y: y[0, -1].add_(1),
        lambda y: y[2, 3].fill_(float("nan")),
        lambda y: y[1].mul_(1.001),
    ],
    ids=["a row", "a value", "NaN", "a row by a little"],
)
def test_the_gate_sees_what_is_wrong(damage, monkeypatch):
    work = Work(case("product"), DEVICE)
    right = work.by(LARGE)[0]

    def damaged(tile):
        got = right.clone()
        if tile == LARGE:
            damage(got)
        return [got]

    monkeypatch.setattr(work, "by", damaged)
    other = default_tile(work.problem, "cpu")
    found, failed, (message,) = check(work, [LARGE, other], NEVER)
    assert (found, failed) == ([other], 0)
    assert str(LARGE) in message
    assert "is wrong for Problem(kind='product'" in message


def test_one_wrong_row_of_many_is_seen():
    """As a share of everything it would be lost in the rounding."""
    expected = torch.randn(100_000, 8)
    got = expected.bfloat16()
    assert worst_error([got], [expected]) < 2 * torch.finfo(torch.bfloat16).eps
    got[77] = 0
    assert worst_error([got], [expected]) > 0.5


def test_what_does_not_run_is_counted_and_time_runs_out(monkeypatch):
    work = Work(case("product"), DEVICE)
    by = work.by

    def failing(tile):
        if tile.rows == 64:
            raise RuntimeError("out of resource: shared memory")
        return by(tile)

    monkeypatch.setattr(work, "by", failing)
    tiles = [LARGE, dataclasses.replace(LARGE, rows=64), dataclasses.replace(LARGE, rows=16)]
    assert check(work, tiles, NEVER) == ([tiles[0], tiles[2]], 1, [])
    assert check(work, tiles, 0.0) == ([LARGE], 0, [])  # the first is run whatever the time


class Recorder:
    def __init__(self):
        self.calls = []

    def milliseconds(self, call):
        self.calls.append(call.args[0])
        return float(len(self.calls))


def test_rounds_are_interleaved_and_end_in_time():
    tiles, stopwatch = [LARGE, None, Tile(16, 16, 16)], Recorder()
    times = rounds(Work(case("product"), DEVICE), tiles, stopwatch, 8, NEVER)
    by_round = [stopwatch.calls[3 * i : 3 * i + 3] for i in range(8)]
    assert all(set(one) == set(tiles) for one in by_round)
    assert len({tuple(map(str, one)) for one in by_round}) > 1
    assert {tile: len(found) for tile, found in times.items()} == dict.fromkeys(tiles, 8)
    stopped = rounds(Work(case("product"), DEVICE), tiles, Recorder(), 8, 0.0)
    assert all(len(found) == LEAST_ROUNDS for found in stopped.values())


def test_the_default_gives_way_to_a_clear_gain_alone():
    default, other = LARGE, Tile(16, 16, 16)
    assert fastest({default: 1.0, other: CLEARLY_FASTER}, default) == default
    assert fastest({default: 1.0, other: 0.97}, default) == other
    assert fastest({default: 1.0, None: 0.5, other: 0.97}, default) is None
    assert fastest({other: 9.0}, default) == other  # the default does not run
    assert fastest({}, default) is None


def test_medians_decide(monkeypatch):
    """One slow round of the faster tile is not held against it."""
    problem = case("product")
    default = default_tile(problem.problem, "cpu")
    rival = dataclasses.replace(LARGE, rows=64)
    monkeypatch.setattr(measuring, "tiles_to_try", lambda *args: [default, rival])
    monkeypatch.setattr(measuring, "default_tile", lambda *args: default)
    monkeypatch.setattr(measuring, "rounds", lambda *args: {default: [2.0, 2.0, 2.0], rival: [1.0, 1.0, 99.0]})
    outcome = measuring.measure(problem, DEVICE, 60.0)
    assert outcome == Outcome(problem.problem.key, 2.0, 1.0, rival, 2, 0, 0)
    assert str(outcome).startswith(f"{problem.problem.key}: default 2 ms, best 1 ms {named(rival)}")


def test_products_of_a_layer():
    trained = cases([(512, 4, 64, 128, 2)], ["float16"], ["swiglu"])
    assert [each.problem.key for each in trained] == [
        "forward gated float16 256x4x256x64",
        "product float16 256x4x64x128",
        "backward gated float16 256x4x64x128",
        "weight float16 256x4x64x128",
        "weight float16 256x4x256x64",
        "turned float16 256x4x256x64",
    ]
    assert {each.problem.kind for each in trained} == set(KINDS)
    decoded = cases([(128, 4, 64, 128, 2)], ["float16"], ["swiglu"])
    assert [each.problem.kind for each in decoded] == ["forward", "product"]
    assert all(each.problem.key.endswith("decode") for each in decoded)
    assert cases([(512, 4, 64, 128, 2)], ["float16"], ["swiglu", "geglu"]) == trained  # the same rows of the table
    with pytest.raises(ValueError, match="float32, bfloat16, float16; got 'float64'"):
        cases([(512, 4, 64, 128, 2)], ["float64"], ["gelu"])
    with pytest.raises(ValueError, match="unknown activation"):
        cases([(512, 4, 64, 128, 2)], ["float16"], ["sine"])


def test_each_of_several_results_counts():
    work = Work(case("backward"), DEVICE)
    expected = truth(work)
    for i in range(3):
        got = [result.clone() for result in expected]
        got[i][-1] += 1
        assert worst_error(got, expected) > 0.1
    with pytest.raises(ValueError, match="expected"):
        worst_error([expected[0][:1]], expected[:1])
