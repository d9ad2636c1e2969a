"""From one dense block to the MoE that takes its place."""

import copy
from typing import Any

import torch
from torch import Tensor, nn

from fastmoe._errors import check_int
from fastmoe.convert.patterns import FeedForward, further_arguments, has_hooks
from fastmoe.convert.projection import Projection, in_features
from fastmoe.convert.recipe import Recipe
from fastmoe.convert.twin import mixes_rows, undisturbed
from fastmoe.experts import MLPExperts
from fastmoe.layer import MoE
from fastmoe.routers import ROUTERS, RoutingContext

FIXED_BY_UPCYCLING = ("d_hidden", "activation", "bias")
INSIDE_OF_A_KNOWN_BLOCK = (*FIXED_BY_UPCYCLING, "dropout")


def moe_from_known(name: str, dense: FeedForward, recipe: Recipe) -> MoE:
    """A MoE of stacked experts shaped like `dense`; for upcycling each of them a copy of it."""
    defaults = {
        "d_hidden": dense.d_hidden,
        "activation": dense.activation,
        "bias": dense.bias,
        "dropout": dense.dropout,
        "device": dense.parts.up.weight.device,
        "dtype": dense.parts.up.weight.dtype,
    }
    _check_width(name, dense.d_model, recipe)
    if recipe.upcycles:
        _check_same_inside(name, defaults, recipe)
    elif recipe.options.get("expert") is not None:
        defaults = {key: defaults[key] for key in ("device", "dtype")}
    moe = recipe.make(dense.d_model, defaults, dense.output_dropout)
    if recipe.upcycles:
        _copy_weights(moe, dense)
        silence_shared_expert(moe)
    return moe


def moe_from_unknown(name: str, block: nn.Module, recipe: Recipe) -> MoE:
    """A MoE of whole modules: for upcycling `block` itself and copies of it, else copies with fresh weights."""
    d_model = _width_of(name, block, recipe)
    some = next(block.parameters(), None)
    defaults: dict[str, Any] = {} if some is None else {"device": some.device, "dtype": some.dtype}
    if recipe.options.get("expert") is None:
        _check_can_be_expert(name, block, d_model, recipe)
        copies = [copy.deepcopy(block) for _ in range(recipe.num_experts - 1)]
        defaults["expert"] = [block, *copies] if recipe.upcycles else block
    moe = recipe.make(d_model, defaults)
    if recipe.upcycles:
        silence_shared_expert(moe)
    return moe


def _check_width(name: str, d_model: int, recipe: Recipe) -> None:
    asked = recipe.options.get("d_model")
    if asked not in (None, d_model):
        raise ValueError(f"block {name!r} has width {d_model}, got d_model={asked}")


def _check_same_inside(name: str, inside: dict[str, Any], recipe: Recipe) -> None:
    for key in FIXED_BY_UPCYCLING:
        asked = recipe.options.get(key)
        if asked is not None and asked != inside[key]:
            raise ValueError(
                f"init='upcycle' copies the block {name!r}, which has {key}={inside[key]!r}; got {key}={asked!r}. "
                "Leave it out, or use init='random'"
            )


def _check_can_be_expert(name: str, block: nn.Module, d_model: int, recipe: Recipe) -> None:
    kind = f"block {name!r} ({type(block).__name__})"
    for key in INSIDE_OF_A_KNOWN_BLOCK:
        if recipe.options.get(key) is not None:
            raise ValueError(f"{kind} is replicated as it is, because its inside is not known; {key}= does not apply")
    if type(block).forward is nn.Module.forward:
        raise ValueError(f"{kind} has no forward; target the modules inside it")
    required = [p.name for p in further_arguments(block) if p.default is p.empty]
    if required:
        raise ValueError(f"{kind} needs more than one argument ({', '.join(required)}); an expert gets only its rows")
    if not has_hooks(block) and mixes_rows(block, d_model):
        raise ValueError(f"{kind} mixes tokens, as attention does; an expert sees only the rows it was sent")


def _width_of(name: str, block: nn.Module, recipe: Recipe) -> int:
    asked = recipe.options.get("d_model")
    if asked is not None:
        return check_int("d_model", asked, 1)
    for module in block.modules():
        if (width := in_features(module)) is not None:
            return width
    raise ValueError(f"cannot tell the width of block {name!r} ({type(block).__name__}); give d_model=")


@torch.no_grad()
def _copy_weights(moe: MoE, dense: FeedForward) -> None:
    """Every expert becomes the dense block."""
    experts = moe.experts
    assert isinstance(experts, MLPExperts)
    up, down, gate = dense.parts.up, dense.parts.down, dense.parts.gate
    first = [up] if gate is None else [gate, up]
    _fill(experts.w1, torch.cat([p.weight for p in first]), first[0].trainable)
    _fill(experts.w2, down.weight, down.trainable)
    if experts.b1 is not None and experts.b2 is not None:
        _fill(experts.b1, torch.cat([_bias(p) for p in first]), any(p.bias_trainable for p in first))
        _fill(experts.b2, _bias(down), down.bias_trainable)


def _bias(projection: Projection) -> Tensor:
    """The bias (out,); where the dense block had none, zeros, which stay frozen."""
    return projection.weight.new_zeros(projection.weight.shape[0]) if projection.bias is None else projection.bias


def _fill(stacked: nn.Parameter, dense: Tensor, trainable: bool) -> None:
    stacked.copy_(dense.expand_as(stacked))
    stacked.requires_grad_(trainable)


def weights_sum_to_one(moe: MoE) -> bool:
    """Whether the weights of a registered router do, on random tokens in evaluation; of another router, or on the meta
    device, True: not known.
    """
    router = moe.router
    example = next(moe.parameters())
    if not isinstance(router, tuple(ROUTERS.values())) or example.is_meta:
        return True
    with undisturbed(), torch.no_grad():
        twin = copy.deepcopy(router).eval()
        x_TD = torch.randn(64, moe.d_model, device="cpu").to(example)
        ids_T = torch.zeros(64, dtype=torch.int64, device=example.device)
        routing = twin(x_TD, RoutingContext(token_ids_T=ids_T)) if router.takes_context else twin(x_TD)
        kept_N = routing.weights_N.masked_fill(routing.expert_ids_N < 0, 0)
        total_T = kept_N.new_zeros(64).index_add(0, routing.token_ids_N, kept_N)
        return bool(torch.allclose(total_T, torch.ones_like(total_T), atol=1e-2))


@torch.no_grad()
def silence_shared_expert(moe: MoE) -> None:
    """A shared expert starts at zero, for the outputs to stay as they were."""
    if moe.shared is not None:
        for parameter in moe.shared.w2.parameters():
            parameter.zero_()
