"""Every router on two processes: what it gives on them together is what one process gives for the whole batch."""

import pytest
import torch
import torch.distributed as dist
from processes import needs_gloo, run
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import fastmoe
from fastmoe.routers import ROUTERS, noise, option_names

WORLD, D, E, LENGTH, STEPS = 2, 6, 4, 3, 3
SEQUENCES = {"even": (2, 2), "uneven": (3, 1), "one_process_without": (2, 0)}
ONE_EXPERT = {"switch", "base"}
BY_WEIGHT = "by weight"
OPTIONS = {
    "topk": {"z_loss_weight": 0.1},
    "loss_free": {"sequence_loss_weight": 0.1},
    "hash": {"vocab_size": 11},
    "expert_choice": {"capacity_factor": 1.5},
}
NAMES = sorted(name for name, cls in ROUTERS.items() if cls.__module__.startswith("fastmoe."))
CASES = [*NAMES, f"topk {BY_WEIGHT}"]
SHARDED = ["loss_free", "noisy_topk", "base"]


def build(case, scope):
    """A layer after another, so that the router's input has gradients too."""
    torch.manual_seed(1)
    name = case.split()[0]
    options = dict(OPTIONS.get(name, {}))
    known = option_names(ROUTERS[name])
    if "capacity_factor" in known:
        options.setdefault("capacity_factor", 0.75)
    if BY_WEIGHT in case:
        options["drop_by"] = "weight"
    if "stats_scope" in known:
        options["stats_scope"] = scope
    top_k = 1 if name in ONE_EXPERT else 2
    layer = fastmoe.MoE(D, E, top_k, d_hidden=4, router=name, router_options=options)
    for parameter in layer.router.parameters():
        nn.init.normal_(parameter)  # a router that starts at zero has equal scores only
    return nn.Sequential(nn.Linear(D, D), layer).double()


def batch(sequences, rank, step):
    """x, mask, ids and the gradient from above of one process; some tokens are padding."""
    generator = torch.Generator().manual_seed(10 * step + rank)
    shape = (SEQUENCES[sequences][rank], LENGTH)
    x = torch.randn(*shape, D, dtype=torch.float64, generator=generator)
    upstream = torch.randn(*shape, D, dtype=torch.float64, generator=generator)
    mask = torch.rand(shape, generator=generator) > 0.2
    return x, mask, torch.randint(11, shape, generator=generator), upstream


class Noise:
    """In the stead of `noise`: the numbers of one draw for the whole batch, of which a process takes its tokens'."""

    def __init__(self, first_token):
        self.first_token, self.draws = first_token, 0

    def draw(self, sample, like):
        generator = torch.Generator().manual_seed(self.draws)
        self.draws += 1
        everyone = sample(64, *like.shape[1:], generator=generator, dtype=torch.float64)
        return everyone[self.first_token : self.first_token + len(like)].to(like.dtype)

    def uniform(self, like):
        return self.draw(torch.rand, like)

    def normal(self, like):
        return self.draw(torch.randn, like)


def train(model, parallel, batches, first_token, upstream_scale=1.0, optimizer=None):
    """What can be seen of some steps of training."""
    own = Noise(first_token)
    noise.uniform, noise.normal = own.uniform, own.normal
    optimizer = optimizer or torch.optim.SGD(model.parameters(), lr=0.1)
    seen = []
    for x, mask, ids, upstream in batches:
        model[1].token_ids = ids
        mask_of_batch[0] = mask
        y = parallel(x)
        optimizer.zero_grad()
        (y * upstream).sum().mul(upstream_scale).backward()
        stats = model[1].last_stats
        losses = {name: torch.tensor(loss, dtype=torch.float64) for name, loss in stats.losses.items()}
        grads = {name: whole(p.grad) for name, p in model.named_parameters() if p.grad is not None}
        optimizer.step()
        buffers = {name: b.clone() for name, b in model.named_buffers()}
        seen.append(
            {
                "y": y.detach(),
                "losses": losses,
                "dropped": torch.tensor(stats.dropped),
                "counts": stats.counts.clone(),
                "grads": grads,
                "buffers": buffers,
            }
        )
    return seen


def whole(grad):
    return grad.full_tensor() if isinstance(grad, DTensor) else grad.clone()


mask_of_batch = [None]


def with_mask(model):
    """Sequential hands on x alone; the layer gets the mask of the batch from here."""
    model[1].register_forward_pre_hook(lambda layer, args: (args[0], mask_of_batch[0]))
    return model


def train_all():
    """What is seen of every case on one of the processes."""
    rank, seen = dist.get_rank(), {}
    for case in CASES:
        for sequences, shares in SEQUENCES.items():
            for scope in ("global", "local"):
                model = with_mask(build(case, scope))
                batches = [batch(sequences, rank, step) for step in range(STEPS)]
                first_token = sum(shares[:rank]) * LENGTH
                seen[case, sequences, scope] = train(model, DistributedDataParallel(model), batches, first_token)
    for case in SHARDED:
        model = with_mask(build(case, "global"))
        for part in (model[1], model):
            fully_shard(part)
        uneven = [batch("uneven", rank, step) for step in range(STEPS)]
        seen[case, "sharded"] = train(model, model, uneven, 9 * rank)
    model[1].router.reset_parameters()
    seen["reset"] = model[1].router.proj.weight.full_tensor().detach()
    model = with_mask(build("loss_free", "global"))
    parallel = DistributedDataParallel(model)
    optimizer = ZeroRedundancyOptimizer(model.parameters(), torch.optim.SGD, lr=0.1)
    seen["zero"] = train(model, parallel, uneven, 9 * rank, optimizer=optimizer)
    return seen


@pytest.fixture(scope="module")
def computed():
    return run(WORLD, train_all)


@pytest.fixture(autouse=True)
def noise_is_put_back(monkeypatch):
    monkeypatch.setattr(noise, "uniform", noise.uniform)
    monkeypatch.setattr(noise, "normal", noise.normal)


def assert_as_one(both, case, sequences):
    """Outputs, losses, drops, loads, gradients (of which the mean is taken) and bias updates, step after step."""
    parts = [[batch(sequences, rank, step) for rank in range(WORLD)] for step in range(STEPS)]
    batches = [tuple(torch.cat(tensors) for tensors in zip(*ranks, strict=True)) for ranks in parts]
    model = with_mask(build(case, "global"))
    for step, expected in enumerate(train(model, model, batches, 0, upstream_scale=1 / WORLD)):
        torch.testing.assert_close(torch.cat([seen[step]["y"] for seen in both]), expected["y"])
        for name in ("dropped", "counts"):
            assert torch.equal(sum(seen[step][name] for seen in both), expected[name]), name
        for seen in both:
            for name in ("losses", "grads", "buffers"):
                torch.testing.assert_close(seen[step][name], expected[name])


@needs_gloo
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("sequences", SEQUENCES)
def test_two_processes_are_as_one(computed, case, sequences):
    assert_as_one([seen[case, sequences, "global"] for seen in computed], case, sequences)


@needs_gloo
@pytest.mark.parametrize("case", SHARDED)
def test_sharded_parameters_too(computed, case):
    assert_as_one([seen[case, "sharded"] for seen in computed], case, "uneven")


@needs_gloo
def test_an_optimizer_whose_state_is_sharded(computed):
    assert_as_one([seen["zero"] for seen in computed], "loss_free", "uneven")


@needs_gloo
def test_a_sharded_router_starts_anew(computed):
    for seen in computed:
        torch.testing.assert_close(seen["reset"] @ seen["reset"].t(), 0.01 * torch.eye(E, dtype=torch.float64))


@needs_gloo
@pytest.mark.parametrize("case", CASES)
def test_local_scope_is_each_process_by_itself(computed, case):
    for sequences, shares in SEQUENCES.items():
        for rank in range(WORLD):
            model = with_mask(build(case, "local"))
            (alone,) = train(model, model, [batch(sequences, rank, 0)], sum(shares[:rank]) * LENGTH)
            together = computed[rank][case, sequences, "local"][0]
            for name in ("y", "losses", "dropped", "counts"):
                torch.testing.assert_close(together[name], alone[name])


@needs_gloo
def test_the_cases_drop_and_move_the_bias(computed):
    """So that the comparison above compares something."""
    last = {case: computed[0][case, "even", "global"][-1] for case in CASES}
    assert all(sum(int(s["dropped"]) for s in computed[0][case, "even", "global"]) > 0 for case in ("topk", "switch"))
    assert last["loss_free"]["buffers"]["1.router.bias_E"].abs().max() > 0.001
