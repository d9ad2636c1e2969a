"""Checkpoints: saved on one layout of processes, loaded on any other, and what all processes are told of."""

import json
import signal

import checkpoint_cases as cases
import pytest
import torch
import torch.distributed as dist
from checkpoint_cases import assert_same, build, optimizer_of, state_of, train, trained
from processes import answer_of, needs_gloo, run, started
from torch.distributed.checkpoint import FileSystemReader
from torch.nn.parallel import DistributedDataParallel

from fastmoe import load, save

ON_4 = ["ep4.ddp", "dp2.ep2.ddp", "dp2.ep2.fsdp", "ep4.fsdp"]
ON_2 = ["ep2.ddp", "dp2.fsdp", "ep2.fsdp"]
FROM_4_TO_4 = [("ep4.ddp", "dp2.ep2.fsdp"), ("dp2.ep2.fsdp", "ep4.ddp")]
FROM_4_TO_2 = [("ep4.ddp", "ep2.ddp"), ("dp2.ep2.fsdp", "ep2.fsdp")]
TRIPS = {
    world: [*(("single", layout, layout) for layout in layouts), *((a, b, f"{a} to {b}") for a, b in between)]
    for world, layouts, between in ((4, ON_4, FROM_4_TO_4), (2, ON_2, FROM_4_TO_2))
}
TARGETS = [target for trips in TRIPS.values() for _, _, target in trips]


def loaded(path, kind="AdamW", **numbers):
    model = build(seed=3, **numbers)
    optimizer = optimizer_of(model, kind)
    load(model, optimizer, path)
    return model, optimizer


def same_losses(got, expected):
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What one process has saved: all of it; stacked experts alone; another optimizer's state; what does not fit."""
    folder = tmp_path_factory.mktemp("checkpoints")
    save(*trained(), folder / "single", extra={"tokens": [1, 2.5, None, True, "x"]})
    save(*trained(modules=0), folder / "stacked")
    save(*trained("Factored"), folder / "factored")
    save(trained()[0], None, folder / "bare")
    for name, number in (("fewer", 4), ("more", 7)):
        save(*trained(stacked=number, modules=number), folder / name)
    model, _ = trained()
    model.other = torch.nn.Linear(2, 2)
    model.listed.experts.modules_list[3].linear.bias = None
    save(model, optimizer_of(model), folder / "names")
    return folder


@pytest.fixture(scope="module")
def truth():
    """The state that was saved, and the losses of the steps after it."""
    model, optimizer = trained()
    return {name: v.clone() for name, v in state_of(model, optimizer).items()}, train(model, optimizer, cases.STEPS)


def together(world, function, *args):
    """What the function returns, which must be the same on every process."""
    first, *others = run(world, function, *args)
    assert others == [first] * len(others)
    return first


@pytest.fixture(scope="module")
def travelled(folder):
    """The losses after each trip; what was saved on it is in the folder."""
    return {
        target: losses
        for world, trips in TRIPS.items()
        for (_, _, target), losses in zip(trips, together(world, cases.round_trips, folder, trips), strict=True)
    }


@needs_gloo
@pytest.mark.parametrize("target", TARGETS)
def test_any_layout_to_any_other(folder, travelled, truth, target):
    """Bit by bit what one process had saved, and the next losses are those that it had."""
    state, losses = truth
    assert_same(state_of(*loaded(folder / target)), state)
    same_losses(travelled[target], losses)


@needs_gloo
def test_split_hidden_width(folder):
    (losses,) = together(2, cases.round_trips, folder, [("stacked", "tp2.ddp", "tp2.ddp")])
    model, optimizer = trained(modules=0)
    assert_same(state_of(*loaded(folder / "tp2.ddp", modules=0)), state_of(model, optimizer))
    same_losses(losses, train(model, optimizer, cases.STEPS))


@needs_gloo
def test_state_of_every_kind(folder):
    """Of 5 stacked experts the processes hold 2, 2, 1 and none."""
    (losses,) = together(4, cases.round_trips, folder, [("factored", "ep4.ddp", "of four")], "Factored")
    model, optimizer = trained("Factored")
    assert_same(state_of(*loaded(folder / "of four", "Factored")), state_of(model, optimizer))
    same_losses(losses, train(model, optimizer, cases.STEPS))


@needs_gloo
def test_a_checkpoint_knows_no_layout(folder, travelled):
    """The same names, shapes and dtypes as the unsharded model's state_dict, and `extra`."""

    def tensors(name):
        saved = FileSystemReader(folder / name).read_metadata().state_dict_metadata
        return {name: (tuple(t.size), t.properties.dtype) for name, t in saved.items()}

    expected = {f"model.{name}": (tuple(t.shape), t.dtype) for name, t in build().state_dict().items()}
    for name in ("single", *TARGETS):
        assert tensors(name) == tensors("single")
        assert {n: t for n, t in tensors(name).items() if n.startswith("model.")} == expected
        document = json.loads((folder / name / "fastmoe.json").read_text())
        assert document["extra"] == {"tokens": [1, 2.5, None, True, "x"]}


@needs_gloo
def test_saving_while_training_goes_on(folder, truth):
    assert together(2, cases.background, folder) == [True, True, True]
    assert_same(state_of(*loaded(folder / "while")), truth[0])


IN_ERRORS = {
    "extra": ["extra must be a plain value", "object"],
    "taken": ["single is there already"],
    "absent": ["no checkpoint"],
    "no optimizer": ["saved without an optimizer"],
    "fewer": [
        "experts 4 of layer 'listed' are not in the checkpoint",
        "layer 'stacked' has 5 experts, the checkpoint 4",
    ],
    "more": ["experts 5, 6 of layer 'listed' are in the checkpoint but not in the model", "the checkpoint 7"],
    "names": [
        "parameters and buffers in the checkpoint that are not here: other.bias, other.weight",
        "parameters and buffers not in the checkpoint: listed.experts.modules_list.3.linear.bias",
        "parameters of the optimizer not in the checkpoint: listed.experts.modules_list.3.linear.bias",
    ],
    "state": ["'odd' of 'listed.experts.modules_list.3.", "got object"],
    "part": ["no process has 3, 4 of the 5", "'optimizer.stacked.experts.w1.exp_avg'"],
}


@needs_gloo
def test_what_goes_wrong_on_one_process_is_raised_by_all(folder):
    """The processes' errors are the same; what could not be saved is not there."""
    found = together(2, cases.errors, folder)
    assert found.keys() == IN_ERRORS.keys()
    for kind, (error, message) in found.items():
        assert error == "ValueError", message
        for words in IN_ERRORS[kind]:
            assert words in message
    assert not list(folder.glob("new*"))


@needs_gloo
def test_a_process_that_dies_while_it_writes(tmp_path):
    save(*trained(), tmp_path / "kept", extra="old")
    with started(2, cases.killed, tmp_path) as running:
        (_, survivors), (_, killed) = [answer_of(*one, limit=60) for one in running]
    assert "CollectiveError" in survivors
    assert killed == f"it ended with exit code {-signal.SIGKILL}"
    model, optimizer = trained()
    assert load(model, optimizer, tmp_path / "kept") == "old"
    save(model, optimizer, tmp_path / "kept", extra="new", overwrite=True)
    assert load(model, optimizer, tmp_path / "kept") == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]


@needs_gloo
def test_one_process_with_torch_distributed(tmp_path, truth):
    """Also around DistributedDataParallel, whose name is in no checkpoint."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    try:
        model, optimizer = trained()
        save(DistributedDataParallel(model), optimizer, tmp_path / "one", asynchronous=True).wait()
    finally:
        dist.destroy_process_group()
    assert_same(state_of(*loaded(tmp_path / "one")), truth[0])


@needs_gloo
@pytest.mark.slow
def test_uneven_parts_of_uneven_parts(tmp_path):
    """Of 7 experts 4 and 3, over three processes each: 2, 2, 0 and 1, 1, 1."""
    model, optimizer = trained(stacked=7)
    save(model, optimizer, tmp_path / "single")
    together(6, cases.round_trips, tmp_path, [("single", "dp3.ep2.fsdp", "back")], "AdamW", 7)
    assert_same(state_of(*loaded(tmp_path / "back", stacked=7)), state_of(model, optimizer))


@needs_gloo
@pytest.mark.slow
@pytest.mark.parametrize("layout", [*ON_4, *ON_2])
def test_every_layout_to_every_other(folder, travelled, truth, layout):
    state, losses = truth
    trips = [(source, layout, f"{source} to {layout} again") for source in (*ON_4, *ON_2) if source != layout]
    found = together(4 if layout in ON_4 else 2, cases.round_trips, folder, trips)
    for (_, _, name), own in zip(trips, found, strict=True):
        assert_same(state_of(*loaded(folder / name)), state)
        same_losses(own, losses)
