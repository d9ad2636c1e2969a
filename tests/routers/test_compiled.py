"""Routers under `torch.compile(fullgraph=True)`: the numbers of eager, with and without padding."""

import pytest
import torch

import fastmoe
from fastmoe.routers import ROUTERS, option_names

ONE_EXPERT = {"switch", "base"}
WAITS_FOR_THE_DEVICE = {"base", "swipe"}  # a graph cannot: see their docstrings
NAMES = sorted(
    n for n, cls in ROUTERS.items() if cls.__module__.startswith("fastmoe.") and n not in WAITS_FOR_THE_DEVICE
)


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", NAMES)
def test_compiled_is_eager(name, training):
    options = {"vocab_size": 11} if name == "hash" else {}
    if "capacity_factor" in option_names(ROUTERS[name]):
        options["capacity_factor"] = 0.75
    layer = fastmoe.MoE(8, 4, 1 if name in ONE_EXPERT else 2, d_hidden=12, router=name, router_options=options)
    layer = layer.double().train(training)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for length in (5, 7, 9):
        x, upstream = torch.randn(2, 3, length, 8, dtype=torch.float64)
        ids, mask = torch.randint(11, (3, length)), torch.rand(3, length) < 0.7
        for extra in ({"token_ids": ids}, {"token_ids": ids, "token_mask": mask}):
            results = []
            for run in (layer, compiled):
                torch.manual_seed(4)
                leaf = x.clone().requires_grad_()
                y = run(leaf, **extra)
                y.backward(upstream)
                results.append((y.detach(), leaf.grad, fastmoe.stats(layer)[""].counts.clone()))
            torch.testing.assert_close(results[1], results[0])
