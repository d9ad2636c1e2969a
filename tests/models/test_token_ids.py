"""A router by token ids is put into any model by the one option."""

import copy

import pytest
import torch
from tiny_models import MAKERS, V, gpt, large, random_tokens

import fastmoe


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_every_model_brings_the_ids_to_its_hash_routers(make):
    model, tokens = copy.deepcopy(make(num_experts=4, top_k=2, router="hash")), random_tokens(2, 5)
    for layer in fastmoe.moe_layers(model).values():
        assert layer.router.vocab_size == V
    model(tokens.int(), tokens)[1].backward()
    counts_E = next(iter(fastmoe.moe_layers(model).values())).last_stats.counts
    table_VK = next(iter(fastmoe.moe_layers(model).values())).router.table_VK
    assert torch.equal(counts_E, table_VK[tokens].flatten().bincount(minlength=4))


def test_generation_goes_by_the_ids_of_each_step():
    model = large(gpt(num_experts=4, top_k=1, router="hash"))
    with_cache, without = (
        model.generate(random_tokens(1, 3), 9, temperature=0, use_cache=use) for use in (True, False)
    )
    assert torch.equal(with_cache, without)


def test_options_go_over_what_the_model_knows():
    model = gpt(num_experts=4, top_k=1, router="hash", router_options={"vocab_size": 60, "seed": 3})
    router = model.blocks[0].mlp.router
    assert (router.vocab_size, router.seed) == (60, 3)
