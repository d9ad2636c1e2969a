"""`moefy`: the MLPs of a built Megatron-Core model become FastMoE layers."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from megatron.core.distributed import DistributedDataParallel
from megatron.core.transformer.mlp import MLP
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.moe.shared_experts import SharedExpertMLP
from torch import nn

from fastmoe._errors import check_choice, check_int
from fastmoe.convert.recipe import INITS
from fastmoe.convert.targets import Target, check_target, names
from fastmoe.convert.upcycle import weights_sum_to_one
from fastmoe.integrations.megatron.layer import FastMoELayer, experts_said
from fastmoe.integrations.megatron.norms import check_norm, norm_before
from fastmoe.integrations.megatron.routing import balancing_of
from fastmoe.integrations.megatron.upcycle import copy_dense, dense_options

logger = logging.getLogger("fastmoe")

BALANCE = 0.01  # fastmoe's own default, for a configuration that says nothing about MoE


@dataclass(frozen=True)
class Place:
    """An MLP, and where it stands."""

    parent: nn.Module
    key: str
    block: MLP


def moefy(
    model: Any,
    num_experts: int,
    top_k: int = 2,
    *,
    target: Target = "auto",
    init: str = "upcycle",
    every: int = 1,
    **moe_options: Any,
) -> Any:
    """Replace the MLPs of a Megatron-Core model by `FastMoELayer`s, in place: `GPTModel`, `HybridModel` and others.

    ```
    model = GPTModel(config, get_gpt_layer_local_spec(), vocab_size, max_sequence_length)
    model = fastmoe.integrations.megatron.moefy(model, num_experts=96, top_k=2)
    ```

    Call it on each process after the model is built, before Float16Module, DistributedDataParallel and the optimizer.
    With expert parallelism the configuration needs `num_moe_experts`, as Megatron asks for itself.

    Args:
        model: built, of dense layers or some of them; or the list of a pipeline stage's models.
        num_experts, top_k: E and K of every new layer.
        target: "auto", every MLP; or which: a class, a glob over names as in `model.named_modules()`, or a predicate
            `(name, module) -> bool`.
        init: "upcycle", every expert starts as a copy of the dense MLP, and the model's outputs stay as they were
            (Komatsuzaki et al. 2022, 2212.05055); "random", fresh experts by the configuration's `init_method`.
        every: replace layers whose number in the model, from 1, is a multiple of it.
        moe_options: as of `FastMoELayer`. Where the configuration does not say `num_moe_experts`, the load-balance
            loss has fastmoe's weight of 0.01 unless `router_options` or `moe_aux_loss_coeff` give another.

    Returns:
        The model.

    Raises:
        ValueError: nothing to replace, an option that does not fit, or a model that is wrapped already. The model is
            then unchanged.
    """
    if isinstance(model, list):
        again: dict[str, Any] = {"target": target, "init": init, "every": every, **moe_options}
        return [moefy(chunk, num_experts, top_k, **again) for chunk in model]
    check_int("num_experts", num_experts, 1), check_int("top_k", top_k, 1), check_int("every", every, 1)
    check_choice("init", init, INITS)
    check_target(target)
    check_bare(model)
    matches = [place for name, place in places(model) if names(target, name, place.block)]
    chosen = [place for place in matches if getattr(place.parent, "layer_number", every) % every == 0]
    if not chosen and not (matches or any(isinstance(part, FastMoELayer) for part in model.modules())):
        raise ValueError(f"found no MLP of Megatron-Core that target={target!r} names in {type(model).__name__}")
    put_layers(chosen, lambda place: _layer(place, num_experts, top_k, init, moe_options))
    if init == "upcycle" and chosen:
        _warn_unless_kept(chosen[0], moe_options)
    return model


def check_bare(model: nn.Module) -> None:
    """Raises:
    ValueError: the model is wrapped already.
    """
    if isinstance(model, DistributedDataParallel | Float16Module):
        raise ValueError(f"moefy wants the model itself, before it is wrapped; got {type(model).__name__}")


def places(model: nn.Module) -> Iterator[tuple[str, Place]]:
    """Every dense MLP that is no part of another MoE layer, by its name."""
    inside = {
        id(part) for layer in model.modules() if isinstance(layer, MoELayer | FastMoELayer) for part in layer.modules()
    }
    for parent_name, parent in model.named_modules():
        for key, block in parent._modules.items():
            dense = isinstance(block, MLP) and not isinstance(block, SharedExpertMLP)
            if dense and id(block) not in inside:
                assert isinstance(block, MLP)
                yield f"{parent_name}.{key}" if parent_name else key, Place(parent, key, block)


def put_layers(chosen: list[Place], make: Callable[[Place], FastMoELayer]) -> None:
    """Put `make(place)` in each of these places; in none, and configurations are as before, if one cannot be made."""
    configs = {id(place.block.config): place.block.config for place in chosen}
    before = {key: dict(vars(config)) for key, config in configs.items()}
    for place in chosen:
        check_norm(place.parent, place.block)
    try:
        made = [(place, make(place)) for place in chosen]
    except BaseException:
        for key, config in configs.items():
            vars(config).clear()
            vars(config).update(before[key])
        raise
    for place, layer in made:
        weight = place.block.linear_fc2.weight
        layer.to(weight.device, weight.dtype)
        if (number := getattr(place.parent, "layer_number", None)) is not None:
            layer.set_layer_number(number)
        norm_before(place.parent, place.block)
        place.parent._modules[place.key] = layer.train(place.block.training)


def _layer(place: Place, num_experts: int, top_k: int, init: str, options: dict[str, Any]) -> FastMoELayer:
    block, config = place.block, place.block.config
    silent = experts_said(config) is None and balancing_of(config) == ("aux_loss", 0.0)
    if silent and options.get("router") in (None, "topk"):
        options = options | {"router_options": {"aux_loss_weight": BALANCE} | (options.get("router_options") or {})}
    if init == "upcycle":
        options = dense_options(block, top_k, options)
    mtp = getattr(place.parent, "is_mtp_layer", False)
    layer = FastMoELayer(config, num_experts, top_k, is_mtp_layer=mtp, **options)
    if init == "upcycle":
        copy_dense(layer, block)
    return layer


def _warn_unless_kept(place: Place, options: dict[str, Any]) -> None:
    layer = place.parent._modules[place.key]
    assert isinstance(layer, FastMoELayer)
    if not weights_sum_to_one(layer.moe):
        logger.warning(
            "moefy: outputs change, since the weights of router %s do not sum to 1 for each token: leave out scaling "
            "factors, capacities and routers whose weights do not",
            options.get("router") or type(layer.moe.router).__name__,
        )
