"""`moefy`: an existing model becomes a Mixture-of-Experts model."""

import logging
from typing import Any

from torch import nn

from fastmoe._errors import check_int
from fastmoe.convert.recipe import Recipe
from fastmoe.convert.split import put_moe_between, split_pattern_of
from fastmoe.convert.targets import Match, Search, Target, nothing_matched
from fastmoe.convert.transformer import leave_fused_paths, output_dropout_of, put_moe_into
from fastmoe.convert.upcycle import moe_from_known, moe_from_unknown, weights_sum_to_one
from fastmoe.layer import MoE

logger = logging.getLogger("fastmoe")


def moefy(
    model: nn.Module,
    num_experts: int,
    top_k: int = 2,
    *,
    target: Target = "auto",
    init: str = "upcycle",
    every: int = 1,
    **moe_options: Any,
) -> nn.Module:
    """Replace feed-forward blocks by MoE layers, in place; `fastmoe.moefy` says what the arguments are.

    It goes on from here where a model belongs to a library that has to know.
    """
    recipe = Recipe(num_experts, top_k, init, moe_options)
    check_int("every", every, 1)
    search = Search(model, target)
    if not search.matches:
        raise nothing_matched(search)
    chosen = [match for match in search.matches[every - 1 :: every] if not match.done]
    if not chosen and not any(match.done for match in search.matches):
        raise ValueError(f"every={every} chooses none of the {len(search.matches)} matching blocks")
    made = [(match, _make(match, recipe)) for match in chosen]
    for match, moe in made:
        model = _put(model, match, moe)
    leave_fused_paths(model)
    if recipe.upcycles and made and not weights_sum_to_one(made[0][1]):
        logger.warning(
            "moefy: outputs change, since the weights of router %r do not sum to 1 for each token",
            moe_options.get("router", "topk"),
        )
    fate = "left out (name it by target= to replicate it)" if target == "auto" else "replicated as it is"
    for block in search.look_alikes:
        logger.warning("moefy: %s: %s", fate, block)
    return model


def _make(match: Match, recipe: Recipe) -> MoE:
    if match.inside is None:
        moe = moe_from_unknown(match.name, match.block, recipe)
    else:
        moe = moe_from_known(match.name, match.inside, recipe)
    return moe.train(match.block.training)


def _put(model: nn.Module, match: Match, moe: MoE) -> nn.Module:
    """`model` with `moe` wherever the block was."""
    if match.inside is not None and output_dropout_of(match.block) is not None:
        put_moe_into(match.block, moe)
        return model
    split = split_pattern_of(match.block)
    if match.inside is not None and split is not None:
        put_moe_between(match.block, split, moe)
        return model
    if match.block is model:
        return moe
    for parent in list(model.modules()):
        for key, child in parent._modules.items():
            if child is match.block:
                parent._modules[key] = moe
    return model
