"""Data parallelism with `DistributedDataParallel`: nothing special to write."""

import pytest
import torch
import torch.distributed as dist
from processes import needs_gloo, run
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import fastmoe

WORLD = 2
KINDS = ["stacked", "modules", "shared"]
TOKENS = {"even": (6, 6), "uneven": (9, 2), "one_process_without": (5, 0)}


def build(kind):
    torch.manual_seed(1)
    small = nn.Sequential(nn.Linear(6, 3), nn.ReLU(), nn.Linear(3, 6))
    options = {
        "stacked": {"d_hidden": 4},
        "modules": {"expert": [small, *(nn.Linear(6, 6) for _ in range(7))]},
        "shared": {"d_hidden": 4, "shared_d_hidden": 5, "activation": "swiglu"},
    }
    return nn.Sequential(nn.Linear(6, 6), fastmoe.MoE(6, 8, 2, **options[kind])).double()


def batch(tokens, rank):
    generator = torch.Generator().manual_seed(rank)
    shape = (TOKENS[tokens][rank], 6)
    return [torch.randn(shape, dtype=torch.float64, generator=generator) for _ in range(2)]


def backward(model, x, upstream):
    (model(x) * upstream).sum().backward()


def gradients():
    """By kind and tokens, on one of the processes."""
    grads = {}
    for kind in KINDS:
        for tokens in TOKENS:
            model = build(kind)
            parallel = DistributedDataParallel(model)
            for _ in range(2):  # DDP notices a parameter without gradient at the next forward pass
                model.zero_grad()
                backward(parallel, *batch(tokens, dist.get_rank()))
            grads[f"{kind} {tokens}"] = {name: p.grad for name, p in model.named_parameters()}
    return grads


@pytest.fixture(scope="module")
def computed():
    return run(WORLD, gradients)


@needs_gloo
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tokens", TOKENS)
def test_gradients_are_those_of_the_whole_batch(computed, kind, tokens):
    """One process with all tokens; DDP takes the mean over processes, so its main loss is divided by their number."""
    whole = [torch.cat(parts) for parts in zip(*(batch(tokens, rank) for rank in range(WORLD)), strict=True)]
    model = build(kind)
    backward(model, whole[0], whole[1] / WORLD)
    for rank in range(WORLD):
        together = computed[rank][f"{kind} {tokens}"]
        assert together.keys() == {name for name, _ in model.named_parameters()}
        for name, param in model.named_parameters():
            torch.testing.assert_close(together[name], param.grad, msg=lambda m, n=name: f"{n}: {m}")
