"""Transformer-XL beside an implementation by loops, in segments and as a whole."""

import math

import pytest
import torch
from torch.nn.functional import cross_entropy

import fastmoe
from fastmoe.models import TransformerXL, TransformerXLConfig, language_model_step
from fastmoe.models.transformer_xl import RelativeAttention, relative_shift

TINY = {"vocab_size": 50, "n_layer": 2, "n_head": 2, "d_model": 8, "d_hidden": 16, "memory_length": 6}
EXPERTS = {"num_experts": 4, "top_k": 2}
FORMS = [{}, {"pre_norm": True}, {"cutoffs": (10, 30), "div_value": 2.0}, EXPERTS, EXPERTS | {"pre_norm": True}]


def make(**options):
    """A model in float64 with weights large enough for everything to matter."""
    model = TransformerXL(TransformerXLConfig(**TINY | options)).double().eval()
    for parameter in model.parameters():
        parameter.data.normal_(std=0.5)
    return model


def random_tokens(*shape):
    return torch.randint(50, shape, generator=torch.Generator().manual_seed(1))


def slow_attention(attention, x_SD, context_LD, clamp, sees):
    """Section 3.3, one pair of positions and one head at a time."""
    D, h = x_SD.shape[1], attention.n_head
    d, M = D // h, len(context_LD) - len(x_SD)
    w_k, w_v = attention.kv_proj.weight.chunk(2)
    rows = []
    for i, x_D in enumerate(x_SD):
        heads = []
        for head in range(h):
            own = slice(head * d, (head + 1) * d)
            q = attention.q_proj.weight[own] @ x_D
            scores, values = [], []
            for j, key_D in enumerate(context_LD):
                if not sees(M + i, j):
                    continue
                distance = M + i - j if clamp is None else min(M + i - j, clamp)
                angles = [distance / 10000 ** (2 * n / D) for n in range(D // 2)]
                r_D = torch.tensor([f(a) for f in (math.sin, math.cos) for a in angles], dtype=x_D.dtype)
                k, r = w_k[own] @ key_D, attention.position_proj.weight[own] @ r_D
                scores.append((q @ k + q @ r + attention.u[head, 0] @ k + attention.v[head, 0] @ r) / math.sqrt(d))
                values.append(w_v[own] @ key_D)
            heads.append(torch.stack(scores).softmax(0) @ torch.stack(values))
        rows.append(attention.c_proj.weight @ torch.cat(heads))
    return torch.stack(rows)


def slow_logits(model, tokens_S, sees):
    """The whole text at once, with no memory; `sees(i, j)` says whether position i attends to j."""
    x_SD, clamp = model.token_embedding(tokens_S[None])[0], model.config.clamp_distance
    for block in model.blocks:
        if model.config.pre_norm:
            y_SD = block.attention_norm(x_SD)
            x_SD = x_SD + slow_attention(block.attention, y_SD, y_SD, clamp, sees)
            x_SD = x_SD + block.mlp(block.mlp_norm(x_SD))
        else:
            x_SD = block.attention_norm(x_SD + slow_attention(block.attention, x_SD, x_SD, clamp, sees))
            x_SD = block.mlp_norm(x_SD + block.mlp(x_SD))
    return model.token_embedding.logits(model.final_norm(x_SD)[None])[0]


def in_segments(model, tokens_BS, lengths, **options):
    memory, parts = None, []
    for tokens in tokens_BS.split(lengths, dim=1):
        logits, _, memory = model(tokens, None, memory, **options)
        parts.append(logits)
    return torch.cat(parts, dim=1)


@pytest.mark.parametrize(("S", "L"), [(1, 1), (1, 5), (4, 4), (3, 7)])
def test_the_shift_turns_distances_into_keys(S, L):
    by_distance = torch.arange(L - 1, -1, -1).expand(1, 1, S, L)
    shifted = relative_shift(by_distance)[0, 0]
    for i in range(S):
        for j in range(L - S + i + 1):
            assert shifted[i, j] == L - S + i - j


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_the_model_equals_one_of_loops(form):
    model, tokens = make(**form), random_tokens(2, 7)
    got = model(tokens)[0]
    for sequence in range(2):
        torch.testing.assert_close(got[sequence], slow_logits(model, tokens[sequence], lambda i, j: j <= i))


@pytest.mark.parametrize("clamp", [None, 3])
@pytest.mark.parametrize("memory_length", [0, 1, 3, 6, 100])
def test_segments_equal_the_whole_text_within_the_reach_of_the_memory(memory_length, clamp):
    model, tokens = make(memory_length=memory_length, clamp_distance=clamp), random_tokens(1, 13)
    starts = [0] * 4 + [4] * 4 + [8] * 4 + [12]
    expected = slow_logits(model, tokens[0], lambda i, j: starts[i] - memory_length <= j <= i)
    torch.testing.assert_close(in_segments(model, tokens, 4)[0], expected)


@pytest.mark.parametrize("lengths", [1, 3, [5, 1, 7]], ids=str)
def test_with_one_length_for_all_segments_do_not_matter(lengths):
    model, tokens = make(**EXPERTS), random_tokens(1, 13)
    expected = slow_logits(model, tokens[0], lambda i, j: i - 4 <= j <= i)
    got = in_segments(model, tokens, lengths, memory_length=4, same_length=True)
    torch.testing.assert_close(got[0], expected)


def test_the_gradient_stops_at_the_segment_and_is_that_of_finite_differences():
    torch.manual_seed(0)
    attention = RelativeAttention(TransformerXLConfig(**TINY | {"d_model": 4})).double()
    attention.u.data.normal_(), attention.v.data.normal_()
    hidden = torch.ones(3, 5, dtype=torch.bool).triu(3)

    def run(x, memory, positions, *_):
        return attention(x, torch.cat([memory, x], 1), positions, hidden)

    shapes = ((2, 3, 4), (2, 2, 4), (5, 4))
    inputs = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    assert torch.autograd.gradcheck(run, (*inputs, *attention.parameters()))
    model, tokens = make(), random_tokens(2, 9)
    _, _, memory = model(tokens[:, :4])
    assert not memory.requires_grad
    assert memory.shape == (2, 2, 4, 8)


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_every_parameter_learns_and_the_loss_is_the_cross_entropy(form):
    model, tokens, targets = make(**form).train(), random_tokens(2, 6), random_tokens(2, 6).flip(1)
    _, _, memory = model(tokens)
    loss, memory = language_model_step(model, tokens, targets, memory)
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert memory.shape[2] == 6
    logits = model(tokens, None, model(tokens)[2])[0]
    torch.testing.assert_close(cross_entropy(logits.flatten(0, 1), targets.flatten()), loss)


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_no_position_sees_later_ones(form):
    model, tokens = make(**form), random_tokens(2, 9)
    changed = tokens.clone()
    changed[:, 6:] = (tokens[:, 6:] + 1) % 50
    before, after = in_segments(model, tokens, 5), in_segments(model, changed, 5)
    torch.testing.assert_close(before[:, :6], after[:, :6], rtol=0, atol=1e-12)
    assert not torch.allclose(before[:, 6], after[:, 6])


def test_the_loss_starts_at_that_of_a_uniform_guess():
    for options in ({}, EXPERTS, {"pre_norm": True}):
        model = TransformerXL(TransformerXLConfig(n_layer=2, n_head=2, d_model=32, d_hidden=64, **options))
        loss, _ = language_model_step(model, random_tokens(4, 16), random_tokens(4, 16).flip(0))
        assert loss.item() == pytest.approx(math.log(256), abs=0.15)


def test_upcycling_keeps_the_outputs():
    model, tokens = make(), random_tokens(2, 6)
    before = model(tokens)[0]
    fastmoe.moefy(model, num_experts=4)
    assert list(fastmoe.moe_layers(model)) == ["blocks.0.mlp", "blocks.1.mlp"]
    torch.testing.assert_close(model(tokens)[0], before)


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="top_k=3: give expert_hidden"):
        make(num_experts=4, top_k=3)
    with pytest.raises(ValueError, match="moe_every=3 chooses none"):
        make(num_experts=4, moe_every=3)


def test_an_moe_stands_in_every_nth_block_counted_from_1():
    model = make(**EXPERTS, n_layer=5, moe_every=2)
    assert list(fastmoe.moe_layers(model)) == ["blocks.1.mlp", "blocks.3.mlp"]


@pytest.mark.parametrize("pre_norm", [False, True])
def test_what_comes_out_is_normal_before_the_softmax(pre_norm):
    model = TransformerXL(TransformerXLConfig(**TINY, pre_norm=pre_norm)).double()
    seen = []
    model.token_embedding.logits = lambda x_BSD: seen.append(x_BSD)
    model(random_tokens(2, 5))
    torch.testing.assert_close(seen[0].mean(-1), torch.zeros(2, 5).double())
    torch.testing.assert_close(seen[0].var(-1, correction=0), torch.ones(2, 5).double(), rtol=0.02, atol=0)


def test_far_distances_are_as_exact_as_float64():
    model = make()
    found = model._positions(torch.tensor([5000]))[0]
    angles = [5000 / 10000 ** (2 * n / 8) for n in range(4)]
    expected = torch.tensor([f(a) for f in (math.sin, math.cos) for a in angles], dtype=torch.float64)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-11)


@pytest.mark.parametrize("form", [{}, EXPERTS | {"pre_norm": True}], ids=str)
def test_it_is_one_graph_to_compile(form):
    model, tokens = make(**form), random_tokens(2, 5)
    compiled, memory = torch.compile(model, backend="eager", fullgraph=True), model(tokens)[2]
    torch.testing.assert_close(compiled(tokens, tokens, memory)[1], model(tokens, tokens, memory)[1])
