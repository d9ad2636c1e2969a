"""Models and uses that are not the usual ones: right numbers, or a clear error on every process."""

import copy
import warnings

import processes
import pytest
import torch
import torch.distributed as dist
from processes import needs_gloo
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp.sharded_grad_scaler import ShardedGradScaler
from torch.optim.swa_utils import AveragedModel

import fastmoe

D, E = 6, 4
pytestmark = needs_gloo


def mesh(dp, ep):
    return init_device_mesh("cpu", (dp, ep), mesh_dim_names=("dp", "ep"))


def build(seed=0, **options):
    torch.manual_seed(seed)
    options = options or {"d_hidden": 4}
    return nn.Sequential(nn.Linear(D, D), fastmoe.MoE(D, E, 2, **options), nn.Linear(D, D))


def tokens(number=5):
    return torch.randn(number, D, generator=torch.Generator().manual_seed(dist.get_rank()))


def alike(tensor):
    """How far a tensor is from the first process's."""
    first = tensor.detach().clone()
    dist.broadcast(first, 0)
    return (first - tensor.detach()).abs().max().item()


class Answers(nn.Module):
    """Twice its input, in a dtype and a width of its own."""

    def __init__(self, dtype=None, width=D):
        super().__init__()
        self.dtype, self.width = dtype, width
        self.by = nn.Parameter(torch.tensor([2.0]))

    def forward(self, rows):
        rows = (rows * self.by).to(self.dtype or rows.dtype)
        return nn.functional.pad(rows, (0, self.width - rows.shape[1]))


def error_of(function, *args, **kwargs):
    try:
        function(*args, **kwargs)
    except ValueError as error:
        return str(error)
    return None


def with_answers(experts, num_experts, autocast, to_first):
    """The greatest error of a layer whose experts answer in other dtypes, forward and backward."""
    torch.manual_seed(0)
    layer = fastmoe.MoE(D, num_experts, 1, expert=experts, router="zero" if to_first else "topk")
    whole = copy.deepcopy(layer)
    fastmoe.set_stats_group(whole, [dist.new_group([rank]) for rank in range(2)][dist.get_rank()])
    fastmoe.parallelize(layer, init_device_mesh("cpu", (2,), mesh_dim_names=("ep",)))
    errors = []
    x, other = (tokens().requires_grad_() for _ in range(2))
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y, expected = layer(x), whole(other)
    for result in (y, expected):
        result.float().square().sum().backward()
    for got, wanted in ((y, expected), (x.grad, other.grad)):
        errors.append((got.float() - wanted.float()).abs().max().item())
    return max(errors)


@pytest.mark.parametrize(
    ("dtypes", "autocast"),
    [((None, None, None, None), True), ((None, None, torch.float64, None), False), ((None,), True), ((None,), False)],
    ids=["autocast", "other dtypes", "a process without experts, autocast", "a process without experts"],
)
def test_experts_that_answer_in_other_dtypes(dtypes, autocast):
    experts = [Answers(dtype) for dtype in dtypes]
    assert max(processes.run(2, with_answers, experts, len(experts), autocast, False)) < 0.05


def test_other_widths_are_an_error_on_every_process():
    for message in processes.run(2, refused_widths):
        assert "all experts must return the same width" in message
        assert "[6, 8]" in message


def refused_widths():
    layer = fastmoe.MoE(D, 2, 1, expert=[Answers(), Answers(width=8)], router="round_robin")
    fastmoe.parallelize(layer, init_device_mesh("cpu", (2,), mesh_dim_names=("ep",)))
    return error_of(layer, tokens())


def train_after_unfreezing():
    model = build()
    model[0].requires_grad_(False)
    model[1].requires_grad_(False)
    fastmoe.parallelize(model, mesh(2, 1))
    apart = []
    for unfrozen in (model[2], model[0], model[1].experts, model[1].router):
        unfrozen.requires_grad_(True)
        model.zero_grad()
        model(tokens()).square().sum().backward()
        apart.append(max(alike(p.grad) for p in model.parameters() if p.grad is not None))
    model[0].requires_grad_(False)
    model.zero_grad()
    for _ in range(2):
        model(tokens()).sum().backward()
    return max(apart)


def test_parameters_that_are_unfrozen_later_are_synchronised():
    assert processes.run(2, train_after_unfreezing) == [0.0, 0.0]


def shared(kind):
    model = nn.Sequential(*(fastmoe.MoE(D, 2, 1, d_hidden=4) for _ in range(2)), nn.Linear(D, D))
    if kind == "stacked":
        model[1].experts.w1 = model[0].experts.w1
    elif kind == "experts":
        model[1].experts = model[0].experts
    elif kind == "dense":
        model[0] = fastmoe.MoE(D, 2, 1, expert=[model[2], nn.Linear(D, D)])
    elif kind == "modules":
        one = nn.Linear(D, D)
        model[0] = fastmoe.MoE(D, 2, 1, expert=[one, nn.Linear(D, D)])
        model[1] = fastmoe.MoE(D, 2, 1, expert=[nn.Linear(D, D), one])
    return error_of(fastmoe.parallelize, model, mesh(1, 2))


@pytest.mark.parametrize("kind", ["stacked", "experts", "dense", "modules"])
def test_experts_that_share_parameters_with_others_are_refused(kind):
    assert all("experts cannot share a parameter" in message for message in processes.run(2, shared, kind))


def reused():
    layer = fastmoe.MoE(D, E, 2, d_hidden=4)
    model = nn.Sequential(layer, nn.Tanh(), layer)
    fastmoe.parallelize(model, mesh(1, 2))
    model(tokens()).sum().backward()
    return True


def test_a_layer_at_two_places_is_not_refused():
    assert processes.run(2, reused) == [True, True]


def held_back(engine):
    """How far gradients are apart after backward in nested `no_sync`, then after it; and the error of what is none."""
    inner, outer = build(), nn.Sequential(build(1), nn.Identity())
    for model in (inner, outer[0]):
        fastmoe.parallelize(model, mesh(2, 1), engine=engine)
    both = nn.ModuleList([inner, outer])
    with fastmoe.no_sync(both):
        with fastmoe.no_sync(inner):
            inner(tokens()).sum().backward()
        inner(tokens()).sum().backward()
        outer(tokens()).sum().backward()
    apart = [alike(model[0].weight.grad) if engine == "ddp" else None for model in (inner, outer[0])]
    for model in (inner, outer):
        model(tokens()).sum().backward()
    together = [model[0].weight.grad for model in (inner, outer[0])]
    return apart, [alike(g.full_tensor() if engine == "fsdp" else g) for g in together]


@pytest.mark.parametrize("engine", ["ddp", "fsdp"])
def test_no_sync_nests_and_reaches_every_parallel_model(engine):
    for apart, together in processes.run(2, held_back, engine)[1:]:
        assert engine == "fsdp" or min(apart) > 0
        assert together == [0.0, 0.0]


def errors():
    model = fastmoe.parallelize(build(), mesh(1, 2))
    scalar = nn.Module()
    scalar.by = nn.Parameter(torch.ones(()))
    turned = DeviceMesh("cpu", [1, 0], mesh_dim_names=("ep",))
    plain = build()
    found = [
        error_of(fastmoe.clip_grad_norm_, model[1], 1.0),
        error_of(fastmoe.no_sync(nn.Linear(2, 2)).__enter__),
        error_of(fastmoe.parallelize, plain, turned),
        error_of(fastmoe.parallelize, plain, mesh(1, 2), bucket_cap=1),
        error_of(fastmoe.parallelize, plain, mesh(1, 2), engine="fsdp", ignored_params=set()),
        error_of(fastmoe.parallelize, nn.Sequential(plain, scalar), mesh(1, 2), engine="fsdp"),
    ]
    return found, isinstance(plain[1].dispatcher, fastmoe.dispatch.LocalDispatcher)


def test_errors_come_on_every_process_before_anything_is_changed():
    words = [
        "part of a parallel model",
        "is not parallel",
        "ascending order",
        "unknown option of engine 'ddp' 'bucket_cap'",
        "unknown option of engine 'fsdp' 'ignored_params'",
        "no dimension: 1.by",
    ]
    for found, untouched in processes.run(2, errors):
        assert untouched
        for message, word in zip(found, words, strict=True):
            assert word in message


def unusual_uses():
    model = build(expert=lambda: nn.Linear(D, D))
    model.register_buffer("small", torch.arange(3, dtype=torch.int16) + dist.get_rank())
    model.register_buffer("turned", torch.randn(3, 2).t() + dist.get_rank())
    fastmoe.parallelize(model, mesh(2, 1))
    with torch.inference_mode():
        model(tokens())
    model(tokens()).sum().backward()
    averaged, copied = AveragedModel(model), copy.deepcopy(model)
    averaged.update_parameters(model)
    copied.zero_grad()
    copied(tokens()).sum().backward()
    assert all(p.grad is not None for p in copied.parameters())
    return model.small.tolist(), alike(model.turned), max(alike(p.grad) for p in copied.parameters())


def test_inference_first_buffers_of_any_kind_and_copies():
    assert processes.run(2, unusual_uses) == [([0, 1, 2], 0.0, 0.0)] * 2


def nested_blocks():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Sequential(nn.Linear(D, D), nn.Sequential(fastmoe.MoE(D, E, 2, d_hidden=4))))
    fastmoe.parallelize(model, mesh(1, 2), engine="fsdp", blocks=(nn.Sequential,))
    model(tokens()).sum().backward()
    return alike(model[0][0].weight.grad.full_tensor())


def test_blocks_within_blocks():
    assert processes.run(2, nested_blocks) == [0.0, 0.0]


def norm_of_halves():
    model = build().half()
    fastmoe.parallelize(model, mesh(1, 2))
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 1e4)
    local = sum(p.numel() for p in model[1].experts.parameters())
    everything = sum(p.numel() for p in model.parameters()) + local
    norm = fastmoe.clip_grad_norm_(model, 1.0)
    return norm.item() / (1e4 * everything**0.5), model[0].weight.grad[0, 0].item()


def test_the_norm_of_half_precision_gradients_does_not_overflow():
    for ratio, clipped in processes.run(2, norm_of_halves):
        assert ratio == pytest.approx(1, rel=1e-3)
        assert clipped > 0


def overflow_on_one(step_of_overflow):
    model = fastmoe.parallelize(build(), mesh(1, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = ShardedGradScaler(device="cpu", init_scale=8.0, process_group=dist.group.WORLD)
    seen = []
    for step in range(3):
        fastmoe.set_aux_loss_scale(model, scaler.get_scale())
        scaler.scale(model(tokens()).square().sum()).backward()
        if step == step_of_overflow and dist.get_rank() == 1:
            model[1].experts.w1.grad[0, 0, 0] = torch.inf
        scaler.unscale_(optimizer)
        fastmoe.clip_grad_norm_(model, 1.0)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        seen.append((scaler.get_scale(), alike(model[0].weight)))
    return seen


def test_a_sharded_grad_scaler_skips_a_step_on_all_processes():
    assert processes.run(2, overflow_on_one, 1) == [[(8.0, 0.0), (4.0, 0.0), (4.0, 0.0)]] * 2


def warned():
    model = fastmoe.parallelize(build(expert=lambda: nn.Linear(D, D)), mesh(1, 2), engine="fsdp")
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        model(tokens()).sum().backward()
    return [str(warning.message) for warning in found if "view" in str(warning.message)]


def test_fsdp_gathers_experts_once_and_has_nothing_to_warn_of():
    assert processes.run(2, warned) == [[], []]


def sliced_sequence():
    model = build(d_hidden=4, router="soft")
    fastmoe.parallelize(model, init_device_mesh("cpu", (2,), mesh_dim_names=("tp",)), tp="slice")
    return error_of(model, torch.randn(4, D))


def test_a_sequence_is_not_cut_by_slices():
    assert all("router of whole sequences" in message for message in processes.run(2, sliced_sequence))
