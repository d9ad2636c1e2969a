"""The router that Megatron's arguments describe."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from fastmoe.integrations.megatron.expert_bias import ExpertBiasRouter, SequenceLossRouter
from fastmoe.routers.loss_free import LossFreeRouter

if TYPE_CHECKING:
    from megatron.core.transformer.transformer_config import TransformerConfig

KINDS = ("aux_loss", "global_aux_loss", "seq_aux_loss", "sinkhorn", "none")
# All that says how tokens are routed and balanced, with the values that say nothing.
ARGUMENTS: dict[str, tuple[Any, ...]] = {
    "moe_aux_loss_coeff": (0.0,),
    "moe_z_loss_coeff": (None, 0.0),
    "moe_router_score_function": ("softmax",),
    "moe_router_pre_softmax": (False,),
    "moe_router_topk_scaling_factor": (None, 1.0),
    "moe_router_num_groups": (None,),
    "moe_router_group_topk": (None,),
    "moe_router_enable_expert_bias": (False,),
    "moe_expert_capacity_factor": (None,),
    "moe_router_force_load_balancing": (False,),
}


def router_options(config: TransformerConfig, given: dict[str, Any]) -> dict[str, Any]:
    """`router` and `router_options` of `fastmoe.MoE`, as given and as Megatron's arguments say.

    Raises:
        ValueError: arguments that fastmoe does not have, or that do not go with each other or the router given.
    """
    router = given.get("router")
    if router is not None:
        kind, _ = balancing_of(config)
        if kind in ("seq_aux_loss", "sinkhorn"):
            raise _not_both("moe_router_load_balancing_type", kind, router)
        _check_left_alone(config, router)
        if _keeps_a_bias(router, given):
            raise ValueError(
                "under Megatron the bias of 'loss_free' is moved by its own training loop: in place of router= set "
                "moe_router_enable_expert_bias=True and moe_router_score_function='sigmoid'"
            )
        return {}
    found, options = described(config)
    further = given.get("router_options") or {}
    if not isinstance(found, str) and further:
        raise ValueError(f"with these arguments of Megatron's router give no router_options, got {further}")
    return {"router": found, "router_options": options | further} if isinstance(found, str) else {"router": found}


def described(config: TransformerConfig) -> tuple[str | Callable[..., Any], dict[str, Any]]:
    """The router of Megatron's arguments, and its options where it goes by name."""
    kind, weight = balancing_of(config)
    if config.moe_router_force_load_balancing:
        _check_left_alone(config, "random", but=("moe_router_force_load_balancing",))
        return "random", {}
    if kind == "sinkhorn":
        _check_left_alone(config, "sinkhorn")
        return "sinkhorn", {}
    options = _common_options(config)
    if config.moe_router_enable_expert_bias or kind == "seq_aux_loss":
        return _with_sigmoid(config, kind, weight, options), {}
    score_function = config.moe_router_score_function
    if score_function not in ("softmax", "sigmoid"):
        raise ValueError(f"moe_router_score_function must be softmax or sigmoid, got {score_function!r}")
    options |= {"score_function": score_function}
    if score_function == "softmax":
        options["normalize"] = not config.moe_router_pre_softmax
    options |= {"aux_loss_weight": weight, "z_loss_weight": config.moe_z_loss_coeff or 0.0}
    return "topk", options


def _with_sigmoid(config: TransformerConfig, kind: str, weight: float, options: dict[str, Any]) -> Callable[..., Any]:
    """Sigmoid scores, with a bias for selection, or a loss within each sequence, or both."""
    if config.moe_router_score_function != "sigmoid":
        raise ValueError("moe_router_enable_expert_bias and seq_aux_loss need moe_router_score_function='sigmoid'")
    if config.moe_z_loss_coeff:
        raise ValueError("moe_z_loss_coeff does not go with moe_router_enable_expert_bias or seq_aux_loss")
    if weight and kind != "seq_aux_loss":
        raise ValueError(f"with moe_router_enable_expert_bias the balance loss must be seq_aux_loss, got {kind!r}")
    cls = ExpertBiasRouter if config.moe_router_enable_expert_bias else SequenceLossRouter
    return functools.partial(cls, **options, sequence_loss_weight=weight)


def made_by_name(router: Any) -> bool:
    """Whether a router is one of fastmoe's, which can be made without memory and start later."""
    return isinstance(router, str) or getattr(router, "func", None) in (ExpertBiasRouter, SequenceLossRouter)


def _common_options(config: TransformerConfig) -> dict[str, Any]:
    options: dict[str, Any] = {"scale": config.moe_router_topk_scaling_factor or 1.0}
    groups, best = config.moe_router_num_groups, config.moe_router_group_topk
    if groups:
        if config.moe_router_topk != 2 * (best or 0):
            raise ValueError(
                "moe_router_num_groups: groups are compared by their two best experts, so moe_router_topk must be "
                f"2 * moe_router_group_topk, got {config.moe_router_topk} and {best}"
            )
        options |= {"num_groups": groups, "top_groups": best}
    if config.moe_expert_capacity_factor is not None:
        drop_by = {"probs": "weight", "position": "position"}[config.moe_token_drop_policy]
        options |= {"capacity_factor": config.moe_expert_capacity_factor, "drop_by": drop_by}
    return options


def balancing_of(config: TransformerConfig) -> tuple[str, float]:
    """Kind and weight of the balance loss.

    Raises:
        ValueError: a kind that fastmoe does not have, or several at once.
    """
    kinds, weights = config.moe_router_load_balancing_type, config.moe_aux_loss_coeff
    if isinstance(kinds, list | tuple):
        if len(kinds) != 1:
            raise ValueError(f"one moe_router_load_balancing_type at a time, got {kinds}")
        kinds, weights = kinds[0], weights[0] if isinstance(weights, list | tuple) else weights
    if kinds not in KINDS:
        raise ValueError(f"moe_router_load_balancing_type must be one of {', '.join(KINDS)}, got {kinds!r}")
    return kinds, 0.0 if kinds == "none" else float(weights)


def _check_left_alone(config: TransformerConfig, router: Any, but: tuple[str, ...] = ()) -> None:
    """Raises:
    ValueError: an argument is set that this router does not go by.
    """
    for name, nothing in ARGUMENTS.items():
        value = getattr(config, name)
        if name not in but and value not in nothing and value not in [[one] for one in nothing]:
            raise _not_both(name, value, router)


def _not_both(name: str, value: Any, router: Any) -> ValueError:
    what = repr(router) if isinstance(router, str) else type(router).__name__
    return ValueError(
        f"{name}={value!r} does not go with router {what}: leave one of them out; a router that is given by name takes "
        "its options by router_options"
    )


def _keeps_a_bias(router: Any, given: dict[str, Any]) -> bool:
    if isinstance(router, LossFreeRouter):
        return bool(router.bias_update_rate)
    return router == "loss_free" and bool((given.get("router_options") or {}).get("bias_update_rate", True))
