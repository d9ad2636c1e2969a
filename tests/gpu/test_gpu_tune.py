"""What `fastmoe tune` does on a GPU alone: its clock, its gate, and `F.grouped_mm` among those that are tried."""

import pytest
import torch
from gpu_cases import on_gpu

pytest.importorskip("triton")

SHAPES = [(256, 4, 256, 128, 2), (4, 4, 256, 128, 2)]  # training and decoding


@on_gpu
def test_every_product_is_timed_and_none_is_wrong():
    from fastmoe.tune.measure import measure
    from fastmoe.tune.problems import cases

    timed = []
    for case in cases(SHAPES, ["bfloat16"], ["swiglu"]):
        outcome = measure(case, torch.device("cuda"), seconds=6.0)
        assert not outcome.wrong, outcome.wrong
        assert outcome.default_ms is not None, outcome
        timed.append(outcome.timed)
    assert max(timed) > 2  # more than the rule's tile and F.grouped_mm
