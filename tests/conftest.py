"""Fixtures that every test may use."""

import gc
import os
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # Triton reads it when it is imported

import fastmoe.kernels.torch_ops.mlp
import fastmoe.kernels.torch_ops.ops
from fastmoe.kernels.torch_ops.layout import GroupedLayout, LoopLayout, PaddedLayout

STARTED_FIRST = [
    Path(__file__).parent / name
    for name in (
        "train/test_processes.py",
        "kernels/test_triton_compile.py",
        "train/test_interruption.py",
        "examples/test_examples.py",
    )
]
"""Each takes a worker a minute or so: last, it would keep the others waiting."""


def pytest_collection_modifyitems(config, items):
    if hasattr(config, "workerinput"):  # one of several workers, which take files in this order
        items.sort(key=lambda item: item.path not in STARTED_FIRST)


def pytest_collection_finish():
    gc.freeze()  # modules and tests stay: no collection needs to look through them again


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture
def poison(monkeypatch):
    """Uninitialised memory holds NaN, integers the smallest of their type: whoever reads it is found out."""

    def poisoned(make):
        def call(*args, **kwargs):
            out = make(*args, **kwargs)
            if out.dtype == torch.uint8:
                return out.fill_(255)  # bytes are read as floats, and four of these are NaN
            return out.fill_(float("nan") if out.is_floating_point() else torch.iinfo(out.dtype).min)

        return call

    with torch.device("cpu"):
        torch.empty(0)  # a device context remembers the constructors that it first finds: they must be the real ones
    torch._dynamo.trace_rules.get_torch_obj_rule_map()  # and so does torch.compile
    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty"), (torch, "frombuffer")):
        monkeypatch.setattr(owner, name, poisoned(getattr(owner, name)))


def _padded(num_rows, offsets_E):
    counts_E = torch.diff(offsets_E, prepend=offsets_E.new_zeros(1))
    return PaddedLayout(num_rows, offsets_E, int(counts_E.max()))


LAYOUTS = {"loop": LoopLayout, "padded": _padded, "grouped": GroupedLayout}


@pytest.fixture
def force_layout(monkeypatch):
    """`force_layout(name)` makes the `torch` backend use that layout; the answer lists the calls it was chosen for."""

    def force(name):
        calls = []

        def choose(num_rows, offsets_E, weight_EOI):
            calls.append(num_rows)
            return LAYOUTS[name](num_rows, offsets_E)

        for module in (fastmoe.kernels.torch_ops.ops, fastmoe.kernels.torch_ops.mlp):
            monkeypatch.setattr(module, "choose_layout", choose)
        return calls

    return force


@pytest.fixture(scope="module")
def one_thread():
    """For tensors that are too small for more."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
