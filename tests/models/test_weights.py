"""How weights start, also on memory that was never written; one matrix in two places."""

import copy
import math
import pickle

import pytest
import torch
from tiny_models import MAKERS, gpt, lstm, random_tokens, xl
from torch import nn
from torch.nn.utils import prune

import fastmoe
from fastmoe.models import GPT, NAMED, GPTConfig, build
from fastmoe.models.weights import draw_weights

TINY = [name for name in NAMED if "tiny" in name]
ROUTERS = {"base": 1, "soft": 2, "noisy_topk": 2, "loss_free": 2, "hash": 1}


def on_poisoned_memory(build):
    """A model from the meta device, its memory all NaN, or -1 where it is whole numbers."""
    with torch.device("meta"):
        model = build()
    model.to_empty(device="cpu")
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data.fill_(math.nan if tensor.is_floating_point() else -1)
    return model


@pytest.mark.parametrize("name", TINY)
def test_named_models_start_from_the_meta_device_as_anew(name):
    model = on_poisoned_memory(lambda: build(name))
    model.init_weights()
    for (key, got), expected in zip(model.state_dict().items(), build(name).state_dict().values(), strict=True):
        assert got.isfinite().all(), key
        assert got.std(correction=0).item() == pytest.approx(expected.std(correction=0).item(), rel=0.2), key


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_every_model_takes_memory_by_materialize(make):
    with torch.device("meta"):
        model = make(num_experts=4)
    fastmoe.materialize(model, "cpu")
    assert all(tensor.isfinite().all() for tensor in model.state_dict().values())


@pytest.mark.parametrize("router", ROUTERS)
def test_routers_start_from_the_meta_device_as_anew(router):
    def make():
        return gpt(num_experts=4, top_k=ROUTERS[router], router=router)

    model = on_poisoned_memory(make)
    model.init_weights()
    for (key, got), expected in zip(model.state_dict().items(), make().state_dict().values(), strict=True):
        assert got.isfinite().all(), key
        if not got.is_floating_point() or expected.std(correction=0) == 0:
            assert torch.equal(got, expected), key


@pytest.mark.parametrize("name", TINY)
def test_init_weights_forgets_training(name):
    model = build(name)
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data.fill_(7)
    model.init_weights()
    assert [key for key, tensor in model.state_dict().items() if (tensor == 7).any()] == []


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_norms_and_biases_have_their_start(make):
    model = make(num_experts=4, router="topk")
    for name, parameter in model.named_parameters():
        if "norm" in name and name.endswith("weight"):
            assert (parameter == 1).all(), name
        elif not name.startswith("lstms.") and name.endswith(("bias", ".b1", ".b2")):
            assert not parameter.any(), name
        elif not name.startswith("lstms."):
            assert 0.005 < parameter.std() < 0.03, name


def test_the_lstm_starts_as_torch_s_does_also_again():
    model = lstm(d_model=64)
    for again in (False, True):
        if again:
            model.init_weights()
        for layer in model.lstms:
            for parameter in layer.parameters():
                assert parameter.abs().max() <= 1 / 8  # 1 / sqrt(D), of a uniform distribution
                assert parameter.std().item() == pytest.approx(1 / 8 / math.sqrt(3), rel=0.15)
                parameter.data.fill_(7)


@pytest.mark.parametrize(("pre_norm", "factor"), [(True, 1 / math.sqrt(2 * 8)), (False, 1)])
@pytest.mark.parametrize("experts", [0, 4])
def test_with_pre_norm_what_writes_into_the_residual_stream_starts_smaller(pre_norm, factor, experts):
    block = xl(n_layer=8, d_model=64, d_hidden=128, pre_norm=pre_norm, num_experts=experts).blocks[3]
    first, last = (block.mlp.experts.w1, block.mlp.experts.w2) if experts else (block.mlp.c_fc.weight, None)
    last = block.mlp.c_proj.weight if last is None else last
    assert first.std().item() == pytest.approx(0.02, rel=0.1)
    assert last.std().item() == pytest.approx(0.02 * factor, rel=0.1)
    assert block.attention.c_proj.weight.std().item() == pytest.approx(0.02 * factor, rel=0.1)


class OwnExpert(nn.Module):
    def __init__(self):
        super().__init__()
        self.ln, self.scale, self.c_proj = nn.LayerNorm(64), nn.Parameter(torch.full((64,), 3.0)), nn.Linear(64, 64)

    def forward(self, x):
        return self.c_proj(self.ln(x)) * self.scale


def test_own_experts_and_shared_ones_go_by_what_they_are():
    model = fastmoe.moefy(
        gpt(n_layer=8, d_model=64), num_experts=2, expert=OwnExpert, init="random", shared_d_hidden=96
    )
    model.init_weights()
    moe = model.blocks[0].mlp
    (expert, _) = moe.experts.modules_list
    assert (expert.ln.weight == 1).all()
    assert (expert.scale == 3).all()
    assert not expert.c_proj.bias.any()
    assert moe.shared.w1.weight.std().item() == pytest.approx(0.02, rel=0.1)
    assert moe.shared.w2.weight.std().item() == pytest.approx(0.02 / 4, rel=0.1)


def test_a_name_with_norm_in_it_is_no_norm():
    outer = nn.ModuleDict({"norm_free": gpt()})
    before = outer["norm_free"].blocks[0].mlp.c_fc.weight.clone()
    draw_weights(outer, 0.02, 0.02)
    assert not torch.equal(outer["norm_free"].blocks[0].mlp.c_fc.weight, before)


@pytest.mark.parametrize(("router", "top_k"), [("base", 1), ("topk", 2)])
def test_no_two_routers_or_experts_are_alike(router, top_k):
    first, second = fastmoe.moe_layers(gpt(num_experts=4, top_k=top_k, router=router)).values()
    assert not torch.equal(first.router.proj.weight, second.router.proj.weight)
    assert not torch.equal(first.experts.w1, second.experts.w1)


# One matrix in two places


def is_tied(model):
    return model.head.weight is model.token_embedding.weight


def assign(model):
    model.load_state_dict(gpt().state_dict(), assign=True)
    return model


MOVES = {
    "from meta": lambda model: on_poisoned_memory(gpt),
    "assign": assign,
    "double": lambda model: model.double(),
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "within another": lambda model: nn.Sequential(model).to("meta").to_empty(device="cpu")[0],
}


@pytest.mark.parametrize("move", MOVES.values(), ids=MOVES)
def test_the_tie_stays(move):
    model = move(gpt())
    model.init_weights()
    assert is_tied(model)
    assert sum(p.numel() for p in model.parameters()) == sum(p.numel() for p in gpt().parameters())
    assert is_tied(assign(model))


def test_a_checkpoint_has_the_matrix_under_both_names_or_that_of_the_embedding():
    source, tokens = gpt(), random_tokens(2, 5)
    state = source.state_dict()
    assert {"head.weight", "token_embedding.weight"} < state.keys()
    for leave_out in (None, "head.weight"):
        model = gpt()
        model.load_state_dict({name: tensor for name, tensor in state.items() if name != leave_out})
        assert is_tied(model)
        assert torch.equal(model(tokens)[0], source(tokens)[0])


def test_a_checkpoint_may_be_on_the_meta_device():
    with torch.device("meta"):
        assert is_tied(assign(gpt()))


def test_an_untied_checkpoint_is_refused_by_a_tied_model_and_the_model_stays_as_it_was():
    model, untied = gpt(), gpt(tied=False)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="tied=True wants one matrix"):
        model.load_state_dict(untied.state_dict())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    untied.load_state_dict(gpt(tied=False).state_dict())
    untied.double()
    assert not is_tied(untied)


def test_a_tied_model_is_saved_and_loaded_with_its_optimizer(tmp_path):
    model, tokens = gpt(num_experts=4), random_tokens(2, 5)
    optimizer = torch.optim.AdamW(model.parameters())
    model(tokens, tokens)[1].backward()
    optimizer.step()
    fastmoe.save(model, optimizer, tmp_path / "saved")
    other = gpt(num_experts=4)
    fastmoe.load(other, torch.optim.AdamW(other.parameters()), tmp_path / "saved")
    assert is_tied(other)
    assert all(map(torch.equal, model.state_dict().values(), other.state_dict().values()))


def small_gpt(**given):
    return GPT(GPTConfig(vocab_size=32, block_size=8, n_layer=1, n_head=2, d_model=16, **given))


@pytest.mark.parametrize(
    "again", [lambda model: model.double(), lambda model: load_own_state(model)], ids=["to", "load"]
)
@pytest.mark.parametrize("head", [nn.Linear(16, 3, bias=False), nn.Linear(16, 32, bias=False), nn.Identity()])
def test_a_head_of_ones_own_stays(head, again):
    model = small_gpt()
    model.head = copy.deepcopy(head)
    model = again(model)
    assert model.head.state_dict().keys() == head.state_dict().keys()
    assert getattr(model.head, "weight", None) is not model.token_embedding.weight
    assert model(torch.zeros(1, 4, dtype=torch.int64))[0].shape[-1] == getattr(head, "out_features", 16)


def load_own_state(model):
    model.load_state_dict(copy.deepcopy(model.state_dict()))
    return model


def test_a_pruned_head_stays_pruned():
    model = small_gpt()
    prune.l1_unstructured(model.head, "weight", 0.5)
    model.to("cpu")
    assert (model.head.weight == 0).float().mean().item() == pytest.approx(0.5, abs=0.01)


def test_weights_that_are_no_numbers_load():
    model = small_gpt()
    with torch.no_grad():
        model.token_embedding.weight[3, 2] = float("nan")
    other = load_own_state(model)
    assert other.token_embedding.weight[3, 2].isnan()
    assert other.head.weight is other.token_embedding.weight
