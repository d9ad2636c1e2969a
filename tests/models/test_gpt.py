"""The reference GPT."""

import dataclasses
import math

import pytest
import torch
from tiny_models import gpt, large

import fastmoe
from fastmoe.models import GPT, GPTConfig

TINY = GPTConfig(block_size=16, n_layer=2, n_head=2, d_model=32)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return GPT(TINY)


def random_tokens(*shape):
    return torch.randint(256, shape, generator=torch.Generator().manual_seed(1))


def test_loss_starts_at_that_of_a_uniform_guess(model):
    logits, loss = model(random_tokens(8, 16), random_tokens(8, 16).flip(0))
    assert logits.shape == (8, 16, 256)
    assert loss.item() == pytest.approx(math.log(256), abs=0.1)


def test_no_position_sees_later_ones(model):
    model.eval()
    tokens, changed = random_tokens(2, 16), random_tokens(2, 16)
    changed[:, 9:] = 255 - tokens[:, 9:]
    changed[:, :9] = tokens[:, :9]
    before, after = model(tokens)[0], model(changed)[0]
    torch.testing.assert_close(before[:, :9], after[:, :9])
    assert not torch.allclose(before[:, 9], after[:, 9])


def test_too_many_positions_are_refused(model):
    with pytest.raises(ValueError, match="at most block_size=16 positions; got 17"):
        model(random_tokens(1, 17))


def test_heads_must_divide_the_width():
    with pytest.raises(ValueError, match="multiple of n_head"):
        GPTConfig(d_model=30, n_head=4)


def test_input_and_output_embedding_are_one(model):
    assert model.head.weight is model.token_embedding.weight


@pytest.mark.parametrize("bias", [False, True])
def test_what_writes_into_the_residual_stream_starts_smaller(bias):
    model = GPT(GPTConfig(block_size=8, n_layer=8, n_head=2, d_model=64, bias=bias))
    block = model.blocks[0]
    assert block.mlp.c_fc.weight.std().item() == pytest.approx(0.02, rel=0.1)
    assert block.mlp.c_proj.weight.std().item() == pytest.approx(0.02 / 4, rel=0.1)
    assert block.attention.c_proj.weight.std().item() == pytest.approx(0.02 / 4, rel=0.1)
    if bias:
        assert not block.mlp.c_fc.bias.any()


def test_the_feed_forward_block_and_norms_are_those_of_gpt_2():
    block, x = (
        GPT(GPTConfig(block_size=8, n_layer=1, n_head=2, d_model=8, bias=True)).double().blocks[0],
        torch.randn(5, 8).double(),
    )
    for parameter in block.parameters():
        parameter.data.normal_()
    first, last = block.mlp.c_fc, block.mlp.c_proj
    hidden = x @ first.weight.T + first.bias
    hidden = hidden * (1 + torch.erf(hidden / math.sqrt(2))) / 2
    torch.testing.assert_close(block.mlp(x), hidden @ last.weight.T + last.bias)
    normal = (x - x.mean(1, keepdim=True)) / (x.var(1, keepdim=True, correction=0) + 1e-5).sqrt()
    torch.testing.assert_close(block.mlp_norm(x), normal * block.mlp_norm.weight + block.mlp_norm.bias)


def test_without_bias_nothing_has_one():
    assert not [name for name, _ in GPT(TINY).named_parameters() if name.endswith("bias")]
    biased = [name for name, _ in GPT(dataclasses.replace(TINY, bias=True)).named_parameters() if name.endswith("bias")]
    assert len(biased) == 2 * 6 + 1


def test_the_gradient_is_that_of_finite_differences():
    model, tokens = large(gpt(positions="rotary", n_layer=1)), random_tokens(1, 4) % 50
    names, values = zip(*model.named_parameters(), strict=True)

    def loss(*values):
        return torch.func.functional_call(model, dict(zip(names, values, strict=True)), (tokens, tokens.flip(1)))[1]

    assert torch.autograd.gradcheck(loss, values, fast_mode=True)


def test_generate_continues_past_the_block(model):
    prompt = random_tokens(2, 3)
    longer = model.generate(prompt, 20, generator=torch.Generator().manual_seed(2))
    assert longer.shape == (2, 23)
    assert torch.equal(longer[:, :3], prompt)
    assert model.training


def test_generate_depends_on_its_generator_alone(model):
    prompt = random_tokens(1, 3)
    runs = [model.generate(prompt, 8, top_k=5, generator=torch.Generator().manual_seed(3)) for _ in range(2)]
    assert torch.equal(*runs)


def test_temperature_zero_and_top_1_take_the_likeliest_token(model):
    prompt = random_tokens(2, 3)
    greedy = model.generate(prompt, 5, temperature=0)
    assert torch.equal(greedy, model.generate(prompt, 5, top_k=1))


def test_moefy_turns_every_feed_forward_block_into_experts(model):
    fastmoe.moefy(model, num_experts=4, top_k=2, init="random", d_hidden=64)
    layers = fastmoe.moe_layers(model)
    assert len(layers) == 2
    model.init_weights()
    experts = next(iter(layers.values())).experts
    assert experts.w1.shape == (4, 64, 32)
    assert experts.w1.std().item() == pytest.approx(0.02, rel=0.1)
    assert experts.w2.std().item() == pytest.approx(0.02 / 2, rel=0.1)
    _, loss = model(random_tokens(2, 16), random_tokens(2, 16))
    loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
