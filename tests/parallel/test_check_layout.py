"""`fastmoe check-layout`: right layouts pass, planted errors are found and named."""

import math
import os
import subprocess
import sys
from pathlib import Path

import check_layout_cases as cases
import pytest
import torch
import torch.distributed as dist
from processes import needs_gloo, run

import fastmoe
from fastmoe.check.command import main
from fastmoe.check.compare import FLOOR, difference, scales_of
from fastmoe.check.report import Difference, Report
from fastmoe.check.training import GRADIENTS, OUTPUTS, Record
from fastmoe.parallel.global_state import Piece

pytestmark = needs_gloo

RIGHT = {
    2: [
        ("demo", "dp=2 ep=1", {}),
        ("demo", "dp=1 ep=2", {"chunks": 2, "suppress_duplicates": True}),
        ("demo", "dp=1 ep=2", {"engine": "fsdp"}),
        ("demo", "dp=1 ep=2", {"dtype": "float32"}),
        ("demo stacked", "dp=1 ep=1 tp=2", {"tp": "hidden"}),
        ("demo", "dp=1 ep=1 tp=2", {"tp": "slice"}),
        ("own", "ep=2", {}),
    ],
    4: [
        ("demo", "dp=2 ep=2", {}),
        ("demo", "dp=1 ep=4", {"chunks": 2}),
        ("demo", "dp=2 ep=2", {"engine": "fsdp", "suppress_duplicates": True}),
    ],
}
MORE = [
    *(("demo", "dp=4 ep=1", {"engine": engine}) for engine in ("ddp", "fsdp")),
    *(("demo", "dp=1 ep=4", {"engine": "fsdp", "chunks": c, "suppress_duplicates": d}) for c in (1, 3) for d in (0, 1)),
    *(("demo", f"dp={dp} ep={2 // dp} tp=2", {"tp": "slice"}) for dp in (1, 2)),
    *(("demo stacked", f"dp={dp} ep={2 // dp} tp=2", {"tp": "hidden"}) for dp in (1, 2)),
    *(("own", "dp=2 ep=2", {"engine": engine}) for engine in ("ddp", "fsdp")),
    ("demo", "dp=2 ep=2", {"dtype": "float32"}),
]
WRONG = ["wrong expert", "other gradient", "other buffer", "not a number", "dropout", "jitter"]
REFUSED = {
    "sum": "must be a mean over the batch's rows: of the whole batch",
    "odd rows": r"must divide into 2 equal shares, one for each process along dp and ep \(ep=2\); it has 7 rows",
    "no rows": "it has 0 rows",
    "no gradient": "the loss has no gradient",
    "zero gradient": "gradient norm of the first step is 0.0",
    "infinite loss": "the loss of the first step is -?inf",
    "loss of each row": r"the loss must be a tensor of no dimension, got a tensor \(8,\)",
    "same parameters": "must build the model anew whenever it is called",
    "not three": r"must return \(model, batch, loss\), got Linear",
    "no module": r"a module, tensors and a callable; got \(Tensor, ..., function\)",
    "no tensors": "batch must be a tensor or a tuple of tensors, got list",
    "other lengths": r"as first dimension, got shapes \[\(8, 6\), \(4, 6\)\]",
    "other output": r"is that of the batch, 8, or a multiple of it; got \(9, 6\)",
    "fixed output": r"is \(16, 6\) on one process and \(24, 6\) on many",
    "other batch": "the same batch on every process; process 0 has .* process 1",
    "broken": "^RuntimeError: process 1: KeyError: 'weights'",
}


def found_by(world, jobs):
    """By job, and the same on every process."""
    first, *others = run(world, cases.check_all, jobs)
    assert others == [first] * len(others)
    return dict(zip(map(str, jobs), first, strict=True))


@pytest.fixture(scope="module")
def two():
    return found_by(2, [*RIGHT[2], *((name, "ep=2", {}) for name in (*WRONG, *REFUSED, "tied layers"))])


@pytest.fixture(scope="module")
def four():
    return found_by(4, RIGHT[4])


@pytest.fixture(scope="module")
def more():
    return found_by(4, MORE)


def assert_passed(found):
    assert found.get("error") is None
    assert found["passed"], found["text"]
    assert not found["random"]
    rounding = 1e-13 if "float64" in found["text"] else 1e-5
    assert all(layout < rounding and alone == 0 for layout, alone in found["worst"].values()), found["text"]
    assert list(found["worst"]) == ["outputs", "loss", "gradient norm", "gradients", "weights after 3 steps"]


@pytest.mark.parametrize("job", RIGHT[2], ids=str)
def test_two_processes_are_as_one(two, job):
    assert_passed(two[str(job)])


@pytest.mark.parametrize("job", RIGHT[4], ids=str)
def test_four_processes_are_as_one(four, job):
    assert_passed(four[str(job)])


@pytest.mark.slow
@pytest.mark.parametrize("job", MORE, ids=str)
def test_more_layouts(more, job):
    assert_passed(more[str(job)])


def wrong(two, name):
    found = two[str((name, "ep=2", {}))]
    assert not found["passed"]
    return found


def test_an_expert_that_is_another_elsewhere(two):
    found = wrong(two, "wrong expert")
    assert ["outputs", "step 1"] in found["failed"]
    assert [GRADIENTS, "moe.experts.modules_list.2.weight"] in found["failed"]
    assert [GRADIENTS, "moe.experts.modules_list.0.weight"] not in found["failed"]
    assert "FAIL: above 1e-10 are" in found["text"]


def test_a_gradient_that_is_another(two):
    found = wrong(two, "other gradient")
    assert [name for quantity, name in found["failed"] if quantity == GRADIENTS] == ["first.weight"]
    assert 1e-7 < found["worst"][GRADIENTS][0] < 1e-6  # the mean of no error and one of a millionth
    assert ["gradient norm", "step 1"] in found["failed"]


def test_a_buffer_that_is_another(two):
    assert wrong(two, "other buffer")["failed"] == [["weights after 3 steps", "seen"]]


def test_not_a_number_never_passes(two):
    found = wrong(two, "not a number")
    assert found["worst"]["outputs"][0] == math.inf
    assert not found["random"]


@pytest.mark.parametrize("name", ["dropout", "jitter"])
def test_random_numbers_are_no_failure(two, name):
    found = wrong(two, name)
    assert found["random"]
    assert "UNDECIDED: two runs on one process differ" in found["text"]


def test_layers_that_share_stacked_experts(two):
    found = two[str(("tied layers", "ep=2", {}))]
    assert found.get("passed") or "share" in found.get("error", "")


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_checked_is_said_on_every_process(two, name):
    with pytest.raises(ValueError, match=REFUSED[name]):
        raise ValueError(two[str((name, "ep=2", {}))]["error"])


MODULE = """
import torch
from torch import nn
import fastmoe

class Net(nn.Sequential):
    def forward(self, x):
        return super().forward(x) * (1 + hasattr(self, "fastmoe_parallel"))

def right(kind=nn.Sequential):
    model = kind(nn.Linear(4, 4), fastmoe.MoE(4, 3))
    return model, torch.randn(4, 5, 4), lambda y, x: (y - x).square().mean()

def wrong():
    return right(Net)

number = 1
"""


@pytest.fixture
def module(tmp_path, monkeypatch):
    """A module of the user's in the current folder, by a name of its own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    name = f"mine_{tmp_path.name}"
    Path(f"{name}.py").write_text(MODULE)
    return name


@pytest.fixture(autouse=True)
def _alone(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)


def test_one_process(capsys):
    assert main(["--device", "cpu"]) == 0
    assert "PASS: no difference is above 1e-10" in capsys.readouterr().out
    assert not dist.is_initialized()


def test_a_factory_of_ones_own(module, capsys):
    assert main(["--model", f"{module}:right", "--device", "cpu", "--verbose"]) == 0
    shown = capsys.readouterr().out
    assert "1.experts.w1" in shown
    assert "0.weight" in shown
    assert main(["--model", f"{module}:wrong", "--device", "cpu"]) == 1
    shown = capsys.readouterr().out
    assert "FAIL" in shown
    assert "gradients: 0.weight" in shown
    assert "more: --verbose shows all" in shown
    assert main(["--model", f"{module}:wrong", "--device", "cpu", "--tolerance", "1e9"]) == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--dp", "2", "--ep", "2"], "torchrun --nproc-per-node 4 -m fastmoe check-layout --dp 2 --ep 2"),
        (["--ep", "0"], "dp, ep and tp must be at least 1"),
        (["--model", "nowhere:factory"], "there is no module 'nowhere'"),
        (["--model", "MODULE:none"], "has no function 'none'"),
        (["--model", "MODULE:number"], "has no function 'number'"),
        (["--model", "MODULE"], "--model must be package.module:factory"),
        (["--chunks", "0"], "chunks must be a whole number >= 1, got 0"),
        (["--tp", "2", "--tp-mode", "slice"], "dp=1 x ep=1 x tp=2 is 2 processes, and there is 1: start them by"),
        (["--tolerance", "-1"], "tolerance must be a finite number >= 0, got -1.0"),
    ],
)
def test_what_cannot_be_run(module, arguments, message, capsys):
    assert main([argument.replace("MODULE", module) for argument in arguments]) == 2
    assert message in capsys.readouterr().err


def test_an_error_in_the_factory_is_shown(module, capsys):
    Path(f"{module}.py").write_text("import a_module_that_is_not_there\n")
    assert main(["--model", f"{module}:right"]) == 2
    assert "No module named 'a_module_that_is_not_there'" in capsys.readouterr().err


def test_torchrun(module):
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(fastmoe.__file__).parents[1])}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "fastmoe"]
    options = ["check-layout", "--ep", "2", "--model", f"{module}:wrong", "--engine", "fsdp", "--tolerance", "0.5"]
    ran = subprocess.run([*command, *options], env=env, capture_output=True, text=True, timeout=200)
    assert ran.returncode == 1
    assert ran.stdout.count("dp=1, ep=2, fsdp, float64") == 1
    assert "FAIL: above 0.5 are" in ran.stdout


def piece(values, name="a", shape=None, offset=(0,)):
    local = torch.tensor(values)
    return Piece(name, local, tuple(local.shape) if shape is None else shape, offset)


def test_a_difference_is_relative_to_the_whole_tensor():
    whole = torch.tensor([1.0, -8.0, 2.0])
    assert difference(piece([2.5], shape=(3,), offset=(2,)), whole, 8.0) == 0.5 / 8
    assert difference(piece([math.nan], shape=(3,), offset=(2,)), whole, 8.0) == math.inf
    assert difference(piece([], shape=(3,), offset=(3,)), whole, 8.0) == 0
    assert difference(piece([1.0, -8.0, 3.0]), whole, 0.0) == math.inf


def test_only_small_gradients_are_measured_by_the_greatest():
    pieces = [piece([4.0, -8.0], "large"), piece([1e-9], "small"), piece([1.0], "next")]
    record = Record()
    record.add(GRADIENTS, pieces)
    record.add(OUTPUTS, pieces)
    scales = {name: scales_of(record)[GRADIENTS, name] for name in ("large", "small", "next")}
    assert scales == {"large": 8.0, "small": 8 * FLOOR, "next": 1.0}
    assert scales_of(record)[OUTPUTS, "small"] == pytest.approx(1e-9)


@pytest.mark.parametrize(
    ("layout", "alone", "passed", "random"),
    [(1e-11, 0.0, True, False), (1e-9, 0.0, False, False), (1e-9, 1e-9, False, True), (math.nan, 0.0, False, False)],
)
def test_the_verdict(layout, alone, passed, random):
    report = Report("a layout", 1e-10, (Difference("loss", "step 1", layout, alone),))
    assert (report.passed, report.random) == (passed, random)
    assert (
        report.table()
        .splitlines()[-1 if passed or random else -2]
        .startswith("PASS" if passed else "UNDECIDED" if random else "FAIL")
    )
