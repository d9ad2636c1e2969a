"""The GPT's options: positions, norms, grouped queries, recomputation, the cache."""

import math

import pytest
import torch

import fastmoe
from fastmoe.models import GPT, GPTConfig
from fastmoe.models.attention import CausalSelfAttention, LayerCache, rotate

TINY = {"block_size": 12, "n_layer": 2, "n_head": 4, "d_model": 16}
MODERN = {"positions": "rotary", "norm": "rms", "n_kv_head": 2, "tied": False}
EXPERTS = {"num_experts": 4, "top_k": 2}
FORMS = [{}, {"positions": "rotary"}, MODERN, EXPERTS, MODERN | EXPERTS | {"d_head": 6}]


def make(**options):
    torch.manual_seed(0)
    model = GPT(GPTConfig(**TINY | options)).double().eval()
    for parameter in model.parameters():
        parameter.data.normal_(std=0.4)
    return model


def random_tokens(*shape):
    return torch.randint(256, shape, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("lengths", [1, [5, 1, 4, 2]], ids=str)
def test_with_the_cache_the_logits_are_the_same(form, lengths):
    model, tokens = make(**form), random_tokens(2, 12)
    caches = [LayerCache() for _ in model.blocks]
    parts = [model(segment, caches=caches)[0] for segment in tokens.split(lengths, dim=1)]
    torch.testing.assert_close(torch.cat(parts, dim=1), model(tokens)[0])
    with pytest.raises(ValueError, match="at most block_size=12 positions; got 13"):
        model(tokens[:, :1], caches=caches)


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_with_the_cache_the_same_tokens_are_drawn_also_past_the_block(form):
    model, prompt = make(**form), random_tokens(2, 3)
    with_cache, without = (
        model.generate(prompt, 15, generator=torch.Generator().manual_seed(2), use_cache=use) for use in (True, False)
    )
    assert torch.equal(with_cache, without)


def test_the_cache_is_used_where_tokens_go_alone():
    def widths(model):
        seen = []
        model.token_embedding.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape[1]))
        model.generate(random_tokens(1, 3), 3)
        return seen

    assert widths(make(**EXPERTS)) == [3, 1, 1]
    assert widths(make(**EXPERTS, router="expert_choice")) == [3, 4, 5]
    assert widths(make(**EXPERTS, router_options={"capacity_factor": 1.0})) == [3, 4, 5]
    unlimited = {"capacity_factor": 1.0, "eval_capacity_factor": math.inf}
    assert widths(make(**EXPERTS, router_options=unlimited)) == [3, 1, 1]


@pytest.mark.parametrize("positions", ["learned", "rotary"])
def test_grouped_queries_equal_heads_by_hand(positions):
    config = GPTConfig(**TINY | {"n_kv_head": 2, "positions": positions, "rotary_base": 100.0})
    attention, x = CausalSelfAttention(config).double(), torch.randn(1, 5, 16, dtype=torch.float64)
    w_q, w_k, w_v = attention.qkv_proj.weight.split([16, 8, 8])
    outputs = []
    for head in range(4):
        own, shared = slice(4 * head, 4 * head + 4), slice(4 * (head // 2), 4 * (head // 2) + 4)
        q, k, v = x[0] @ w_q[own].T, x[0] @ w_k[shared].T, x[0] @ w_v[shared].T
        if positions == "rotary":
            q, k = turned(q, base=100.0), turned(k, base=100.0)
        scores = (q @ k.T / 2).masked_fill(torch.ones(5, 5, dtype=torch.bool).triu(1), -math.inf)
        outputs.append(scores.softmax(-1) @ v)
    torch.testing.assert_close(attention(x)[0], torch.cat(outputs, dim=-1) @ attention.c_proj.weight.T)


def turned(x_Sd, first=0, base=10000.0):
    """Pairs of features as complex numbers, multiplied by e^(i angle)."""
    half = x_Sd.shape[1] // 2
    frequencies = torch.tensor([base ** (-n / half) for n in range(half)], dtype=torch.float64)
    angles = (first + torch.arange(len(x_Sd), dtype=torch.float64))[:, None] * frequencies
    pairs = torch.complex(x_Sd[:, :half], x_Sd[:, half:]) * torch.polar(torch.ones_like(angles), angles)
    return torch.cat([pairs.real, pairs.imag], dim=-1)


def test_rotary_scores_depend_on_the_distance_alone():
    q, k = torch.randn(2, 1, 1, 3, 8)
    scores = [rotate(q, start, 100.0) @ rotate(k, start, 100.0).mT for start in (0, 9)]
    torch.testing.assert_close(*scores)


@pytest.mark.parametrize(("dtype", "error"), [(torch.float64, 1e-10), (torch.float32, 5e-3)])
def test_far_positions_are_turned_as_exactly_as_the_dtype_allows(dtype, error):
    x = torch.randn(3, 64, dtype=torch.float64)
    found = rotate(x[None, None].to(dtype), 5000, 10000.0)[0, 0].double()
    torch.testing.assert_close(found, turned(x, 5000), rtol=0, atol=error)


@pytest.mark.parametrize(("recompute", "forwards"), [(False, 1), (True, 2)])
def test_recomputing_runs_every_block_again_in_training_alone(recompute, forwards):
    model, tokens, calls = GPT(GPTConfig(**TINY, recompute=recompute)), random_tokens(2, 12), []
    for number, block in enumerate(model.blocks):
        block.mlp.register_forward_pre_hook(lambda *_, number=number: calls.append(number))
    model(tokens, tokens)[1].backward()
    assert sorted(calls) == sorted([0, 1] * forwards)
    calls.clear()
    model.eval()(tokens, tokens)[1].backward()
    assert calls == [0, 1]


def test_recomputing_drops_the_same_out_again():
    tokens, gradients = random_tokens(2, 12), []
    for recompute in (False, True):
        model = make(dropout=0.5, recompute=recompute).train()
        torch.manual_seed(1)
        model(tokens, tokens.flip(0))[1].backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    for got, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("form", [{}, MODERN | EXPERTS], ids=str)
def test_recomputing_changes_no_gradient(form):
    tokens, gradients = random_tokens(2, 12), []
    for recompute in (False, True):
        model = make(**form, recompute=recompute).train()
        model(tokens, tokens.flip(0))[1].backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    for got, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("form", FORMS[1:], ids=str)
def test_no_option_lets_a_position_see_later_ones(form):
    model, tokens = make(**form), random_tokens(2, 12)
    changed = tokens.clone()
    changed[:, 7:] = 255 - tokens[:, 7:]
    torch.testing.assert_close(model(tokens)[0][:, :7], model(changed)[0][:, :7], rtol=0, atol=1e-12)


def test_options_are_those_of_the_model():
    model = GPT(GPTConfig(**TINY | MODERN | EXPERTS))
    assert model.head.weight is not model.token_embedding.weight
    assert not hasattr(model, "position_embedding")
    assert isinstance(model.final_norm, torch.nn.RMSNorm)
    assert model.head.weight.std().item() == pytest.approx(0.02, rel=0.1)
    experts = fastmoe.moe_layers(model)["blocks.1.mlp"].experts
    assert (experts.w1.shape, experts.b1) == ((4, 32, 16), None)
    assert experts.w2.std().item() == pytest.approx(0.01, rel=0.1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_kv_head": 3}, "n_head=4 must be a multiple of n_kv_head; got 3"),
        ({"positions": "rotory"}, "Did you mean 'rotary'"),
        ({"norm": "batch"}, "unknown norm 'batch'"),
        ({"positions": "rotary", "d_head": 3}, "even width; got 3"),
    ],
)
def test_what_does_not_fit_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        GPTConfig(**TINY | options)


@pytest.mark.parametrize("form", [{}, MODERN | EXPERTS], ids=str)
def test_it_is_one_graph_to_compile(form):
    model, tokens = make(**form), random_tokens(2, 12)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(tokens, tokens)[1], model(tokens, tokens)[1])
