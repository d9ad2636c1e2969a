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
    """Replace feed-forward blocks of `model` by `fastmoe.MoE` layers, in place.

    A block whose inside is known becomes stacked experts of the same widths, activation and dropouts: torch's
    Transformer layers, the rows of `fastmoe.convert.PATTERNS`, and `Sequential(Linear, activation, Linear)`. A block is
    run first, so that one that only looks like a row is not taken for it. Any other block is replicated as it is, and
    must take rows `(rows, D)`. Blocks that are a MoE already are left alone: a second call changes nothing.

    Args:
        model: any module. Its device, dtype, mode and frozen weights are kept; a block used in several places becomes
            one MoE in all of them.
        num_experts, top_k: E and K of every new layer.
        target: "auto", every known block; or which blocks: a module class, a glob over names as in
            `model.named_modules()`, or a predicate `(name, module) -> bool`. Of nested blocks the outermost counts.
        init: "upcycle", every expert starts as a copy of the dense block, and the model's outputs stay as they were
            (Komatsuzaki et al. 2022, Sparse Upcycling, 2212.05055), given a router that drops nothing and whose weights
            sum to 1 for each token, as "topk" has them; of a router by name that has not, a warning is logged.
            "random": fresh experts.
        every: replace every n-th matching block only: 2 means the 2nd, the 4th and so on.
        moe_options: keyword arguments of `fastmoe.MoE`, in place of what the block says; `d_model` where the width of
            a replicated block cannot be told from it.

    Returns:
        The model; where the model itself is a matching block, the MoE that replaces it.

    Raises:
        ValueError: nothing matches; an unknown option, `init` or target; an option that upcycling cannot follow;
            a block that cannot be an expert. The model is then unchanged.

    Note:
        torch's fused eval path of `nn.TransformerEncoder` knows dense weights only and is switched off. It gives zeros
        at padding positions; the ordinary path computes them like any other.
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
