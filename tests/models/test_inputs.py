"""Tokens, targets, memory and caches: what is taken, what is refused."""

import pytest
import torch
from tiny_models import MAKERS, V, gpt, large, lstm, random_tokens, xl

from fastmoe.models.attention import LayerCache

every_model = pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
TOKENS = random_tokens(2, 5)


@every_model
@pytest.mark.parametrize(
    ("tokens", "got"),
    [
        (TOKENS[0], r"int64 of shape \(5,\)"),
        (TOKENS[:, :0], r"int64 of shape \(2, 0\)"),
        (TOKENS[None], r"int64 of shape \(1, 2, 5\)"),
        (TOKENS.float(), r"float32 of shape \(2, 5\)"),
        (TOKENS.to(torch.uint8), r"uint8 of shape \(2, 5\)"),
        (TOKENS.tolist(), "a list"),
    ],
)
def test_tokens_are_whole_numbers_in_two_dimensions(make, tokens, got):
    with pytest.raises(ValueError, match=rf"tokens must be int64 or int32 of shape \(B, S\), S at least 1; got {got}"):
        make()(tokens)


@every_model
def test_targets_are_of_the_shape_of_tokens(make):
    for targets, got in (
        (TOKENS.T, r"int64 of shape \(5, 2\)"),
        (TOKENS[:, :3], r"int64 of shape \(2, 3\)"),
        (TOKENS.float(), "float32 of"),
    ):
        with pytest.raises(ValueError, match=rf"targets must be int64 or int32 of shape \(2, 5\); got {got}"):
            make()(TOKENS, targets)


@every_model
def test_int32_gives_the_same_as_int64(make):
    model = make().eval()
    assert model(TOKENS.int(), TOKENS.int().flip(1))[1] == model(TOKENS, TOKENS.flip(1))[1]


@every_model
@pytest.mark.parametrize("token", [V, 999, -1])
def test_tokens_and_targets_outside_of_the_vocabulary_are_refused(make, token):
    with pytest.raises(IndexError):
        make()(torch.full((2, 5), token))
    with pytest.raises(IndexError):
        make()(TOKENS, torch.full((2, 5), token))


@every_model
def test_a_target_of_minus_100_is_not_counted(make):
    model = large(make())
    targets = TOKENS.flip(1)
    some = targets.masked_fill(targets > 20, -100)
    chosen = model(TOKENS)[0].log_softmax(-1).gather(2, targets[..., None])[..., 0]
    torch.testing.assert_close(model(TOKENS, some)[1], -chosen[targets <= 20].mean())


@pytest.mark.parametrize(("make", "name", "width"), [(xl, "memory", "M, 8"), (lstm, "state", "8")])
def test_a_state_of_another_shape_or_kind_is_refused(make, name, width):
    model = make()
    state = model(TOKENS)[-1]
    layers = len(state)
    one_sequence_more = torch.cat([state, state[:, :1]], 1)
    for value in (one_sequence_more, state[1:], state[..., 1:], state[0], state.long(), list(state)):
        with pytest.raises(ValueError, match=rf"{name} must be floating point of shape \({layers}, 2, {width}\); got"):
            model(TOKENS, None, value)


@pytest.mark.parametrize("make", [xl, lstm])
def test_a_state_is_taken_without_its_graph_and_in_the_model_s_dtype(make):
    model = make().eval()
    state = model(TOKENS)[-1].double().requires_grad_()
    logits, _, after = model(TOKENS, None, state)
    assert not after.requires_grad
    assert logits.dtype == after.dtype == torch.float32
    logits.sum().backward()
    assert state.grad is None


@pytest.mark.parametrize("length", [-1, 2.5, True])
def test_the_memory_s_length_is_a_whole_number(length):
    with pytest.raises(ValueError, match=f"memory_length must be a whole number >= 0, got {length}"):
        xl()(TOKENS, memory_length=length)


def test_a_longer_memory_is_seen_whole_unless_all_have_one_length():
    model = large(xl())
    memory = model(random_tokens(2, 20, seed=3), memory_length=12)[2]
    assert memory.shape[2] == 12
    seen, shorter = (model(TOKENS, None, part)[0] for part in (memory, memory[:, :, -6:]))
    assert not torch.allclose(seen, shorter)
    seen, shorter = (model(TOKENS, None, part, same_length=True)[0] for part in (memory, memory[:, :, -6:]))
    torch.testing.assert_close(seen, shorter)


@pytest.mark.parametrize("number", [0, 1, 3])
def test_there_is_one_cache_for_each_block(number):
    caches = [LayerCache() for _ in range(number)]
    with pytest.raises(ValueError, match=rf"caches must be 2, one for each block.*got {number} with"):
        gpt()(TOKENS, caches=caches)
    assert all(cache.length == 0 for cache in caches)


def test_caches_of_other_sequences_or_of_two_lengths_are_refused_and_stay_as_they_are():
    model, caches = gpt().eval(), [LayerCache() for _ in range(2)]
    model(TOKENS, caches=caches)
    with pytest.raises(ValueError, match=r"of B=1 sequences; got 2 with \(sequences, length\) \[\(2, 5\)\]"):
        model(TOKENS[:1], caches=caches)
    with pytest.raises(ValueError, match=r"\[\(2, 0\), \(2, 5\)\]"):
        model(TOKENS, caches=[caches[0], LayerCache()])
    assert [cache.length for cache in caches] == [5, 5]
