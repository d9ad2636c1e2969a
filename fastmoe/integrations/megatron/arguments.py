"""Megatron's arguments in fastmoe's words: those that are read, those that mean nothing here, those that it lacks."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch.nn.functional as F

from fastmoe._errors import unknown_name
from fastmoe.integrations.megatron.expert_bias import ExpertBiasRouter
from fastmoe.layer import MoE

if TYPE_CHECKING:
    from megatron.core.transformer.transformer_config import TransformerConfig

# Megatron's argument: what it becomes.
READ = {
    "num_moe_experts": "num_experts",
    "moe_router_topk": "top_k",
    "moe_ffn_hidden_size": "d_hidden",
    "moe_shared_expert_intermediate_size": "shared_d_hidden",
    "moe_router_load_balancing_type": "aux_loss and global_aux_loss: whose batch the loss is of; seq_aux_loss: "
    "sequence_loss_weight; none: no loss; sinkhorn: router='sinkhorn'",
    "moe_aux_loss_coeff": "router_options aux_loss_weight, sequence_loss_weight",
    "moe_z_loss_coeff": "router_options z_loss_weight",
    "moe_router_score_function": "router_options score_function",
    "moe_router_pre_softmax": "router_options normalize=False",
    "moe_router_topk_scaling_factor": "router_options scale",
    "moe_router_num_groups": "router_options num_groups",
    "moe_router_group_topk": "router_options top_groups",
    "moe_router_enable_expert_bias": "router='loss_free', whose bias Megatron updates",
    "moe_router_bias_update_rate": "Megatron's own update of that bias",
    "moe_expert_capacity_factor": "router_options capacity_factor",
    "moe_token_drop_policy": "router_options drop_by: position, or weight for probs",
    "moe_router_force_load_balancing": "router='random'",
    "moe_router_dtype": "routing is float32 at least, always",
    "moe_layer_freq": "gpt_layer_spec and moefy: every=",
}

# What chooses among Megatron's own kernels, dispatchers and logs.
OF_NO_EFFECT = (
    "moe_grouped_gemm", "moe_use_legacy_grouped_gemm", "moe_single_grouped_weight", "moe_single_grouped_bias",
    "moe_token_dispatcher_type", "moe_enable_deepep", "moe_flex_dispatcher_backend", "moe_flex_dispatcher_num_sms",
    "moe_deepep_num_sms", "moe_hybridep_num_sms", "moe_hybridep_num_sms_preprocessing",
    "moe_hybridep_num_blocks_permute", "moe_hybridep_num_blocks_unpermute", "moe_hybridep_pad_uneven_dispatch_inputs",
    "moe_permute_fusion_into_hybridep", "moe_ncclep_static_shape", "moe_ncclep_zero_copy", "moe_permute_fusion",
    "moe_router_fusion", "moe_shared_expert_overlap", "moe_pad_expert_input_to_capacity", "moe_per_layer_logging",
    "moe_layer_recompute", "moe_extended_tp", "moe_grad_scale_func", "moe_pad_experts_for_cuda_graph_inference",
    "moe_paged_stash_page_size", "moe_paged_stash_buffer_size_factor_cuda", "moe_paged_stash_buffer_size_factor_cpu",
    "moe_router_quantile_balancing_ema",
)  # fmt: skip

# What must be as it is by default, with these values.
UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "moe_router_topk_limited_devices": (None,),
    "moe_router_padding_for_quantization": (False, None),
    "moe_router_padding_for_fp8": (False, None),
    "moe_router_force_biased": (None,),
    "moe_enable_routing_replay": (False,),
    "moe_input_jitter_eps": (None,),
    "moe_token_dropping": (False,),
    "moe_apply_probs_on_input": (False,),
    "moe_latent_size": (None,),
    "moe_shared_expert_gate": (False,),
    "moe_shared_expert_glu_interleave_size": (None,),
    "moe_mlp_glu_interleave_size": (None,),
    "moe_expert_rank_capacity_factor": (None,),
    "moe_paged_stash": (False,),
    "overlap_moe_expert_parallel_comm": (False,),
}
OF_THE_INSIDE = ("moe_apply_probs_on_input", "moe_latent_size", "moe_mlp_glu_interleave_size", "moe_paged_stash")

# Arguments of `fastmoe.MoE` that may be given beside a configuration, which says device and dtype itself.
OPTIONS = tuple(
    parameter.name
    for parameter in inspect.signature(MoE).parameters.values()
    if parameter.kind is parameter.KEYWORD_ONLY and parameter.name not in ("device", "dtype")
)

ACTIVATIONS: tuple[tuple[Callable[..., Any], str, str], ...] = (
    (F.gelu, "gelu", "geglu"),
    (F.silu, "silu", "swiglu"),
    (F.relu, "relu", "reglu"),
)


def layer_options(config: TransformerConfig, given: dict[str, Any]) -> dict[str, Any]:
    """The keyword arguments of `fastmoe.MoE` that a configuration stands for, under those that are given, in copies.

    Raises:
        ValueError: an argument that fastmoe does not have, or that does not go with what is given; an unknown option.
    """
    check_supported(config, UNSUPPORTED)
    if config.moe_router_dtype == "fp64":
        raise ValueError(
            "moe_router_dtype must be None or 'fp32': routing is in float32 where the model is; got 'fp64'"
        )
    for name in given:
        if name not in OPTIONS:
            raise unknown_name("option", name, OPTIONS)
    options = {name: copy.deepcopy(value) for name, value in given.items()}  # no two layers share a module
    if options.get("expert") is None:
        options = inside_options(config) | options
    if shared := getattr(config, "moe_shared_expert_intermediate_size", None):
        options.setdefault("shared_d_hidden", shared)
        options = {"activation": activation_of(config), "bias": config.add_bias_linear} | options
    if options.get("router") is None:
        router, router_options = _router(config)
        options["router"] = router
        if isinstance(router, str):
            options["router_options"] = router_options | (given.get("router_options") or {})
        elif given.get("router_options"):
            raise ValueError("router_options do not go with moe_router_enable_expert_bias: set Megatron's arguments")
    else:
        _check_left_alone(config, options["router"])
    return options


def inside_options(config: TransformerConfig) -> dict[str, Any]:
    """What built-in experts look like inside."""
    hidden = getattr(config, "moe_ffn_hidden_size", None) or config.ffn_hidden_size
    return {"d_hidden": hidden, "activation": activation_of(config), "bias": config.add_bias_linear}


def check_supported(config: TransformerConfig, names: Any) -> None:
    """Raises:
    ValueError: one of these arguments is not as it is by default.
    """
    for name in names:
        value = getattr(config, name, UNSUPPORTED[name][0])
        if value not in UNSUPPORTED[name]:
            raise ValueError(f"fastmoe has no {name}: leave it at {UNSUPPORTED[name][0]!r}, got {value!r}")


def activation_of(config: TransformerConfig, *, tanh: bool = False) -> str | Callable[..., Any]:
    """fastmoe's name of the activation, or the function itself; `tanh`: where Megatron's GELU is its tanh formula.

    Raises:
        ValueError: a gated activation that fastmoe does not know.
    """
    from megatron.core.transformer.utils import openai_gelu

    function, gated = config.activation_func, config.gated_linear_unit
    clamp, offset = (getattr(config, name, None) for name in ("activation_func_clamp_value", "glu_linear_offset"))
    if clamp is not None or (gated and offset):
        raise ValueError("fastmoe has no activation_func_clamp_value and no glu_linear_offset: leave them out")
    for known, plain, with_gate in (*ACTIVATIONS, (openai_gelu, "gelu_tanh", "geglu_tanh")):
        if function is known:
            name = with_gate if gated else plain
            return f"{name}_tanh" if tanh and known is F.gelu else name
    if gated:
        raise ValueError(f"with gated_linear_unit, activation_func must be gelu, silu or relu, got {function!r}")
    return function


def _router(config: TransformerConfig) -> tuple[str | Callable[..., Any], dict[str, Any]]:
    """The router, and its options where it goes by name."""
    kind, weight = balancing_of(config)
    if getattr(config, "moe_router_force_load_balancing", False):
        return "random", {}
    if kind == "sinkhorn":
        return "sinkhorn", {}
    options = _common_options(config)
    if config.moe_router_enable_expert_bias or kind == "seq_aux_loss":
        return _without_softmax(config, kind, weight, options)
    options |= {"score_function": config.moe_router_score_function}
    if config.moe_router_score_function not in ("softmax", "sigmoid"):
        raise ValueError(f"moe_router_score_function must be softmax or sigmoid, got {options['score_function']!r}")
    if config.moe_router_score_function == "softmax":
        options["normalize"] = not config.moe_router_pre_softmax
    options |= {"aux_loss_weight": weight, "z_loss_weight": config.moe_z_loss_coeff or 0.0}
    return "topk", options


def _without_softmax(
    config: TransformerConfig, kind: str, weight: float, options: dict[str, Any]
) -> tuple[str | Callable[..., Any], dict[str, Any]]:
    """Sigmoid scores with a bias for selection, or a loss within each sequence."""
    if config.moe_router_score_function != "sigmoid":
        raise ValueError("moe_router_enable_expert_bias and seq_aux_loss need moe_router_score_function='sigmoid'")
    if config.moe_z_loss_coeff:
        raise ValueError("moe_z_loss_coeff does not go with moe_router_enable_expert_bias or seq_aux_loss")
    if weight and kind != "seq_aux_loss":
        raise ValueError(f"with moe_router_enable_expert_bias the balance loss must be seq_aux_loss, got {kind!r}")
    options["sequence_loss_weight"] = weight
    if not config.moe_router_enable_expert_bias:
        return "loss_free", options | {"bias_update_rate": 0.0}

    def make(d_model: int, num_experts: int, top_k: int) -> ExpertBiasRouter:
        return ExpertBiasRouter(d_model, num_experts, top_k, **options)

    return make, {}


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
    known = ("aux_loss", "global_aux_loss", "seq_aux_loss", "sinkhorn", "none")
    if kinds not in known:
        raise ValueError(f"moe_router_load_balancing_type must be one of {', '.join(known)}, got {kinds!r}")
    return kinds, 0.0 if kinds in ("none", "sinkhorn") else float(weights)


def _check_left_alone(config: TransformerConfig, router: Any) -> None:
    """Raises:
    ValueError: arguments of Megatron's router are set where another router is given.
    """
    fields = type(config).__dataclass_fields__
    mine = [name for name in READ if "router" in READ[name] or name.startswith(("moe_router", "moe_aux", "moe_z"))]
    for name in mine:
        if name in ("moe_router_topk", "moe_router_dtype", "moe_router_load_balancing_type"):
            continue
        value, default = getattr(config, name), fields[name].default
        if value != default:
            what = repr(router) if isinstance(router, str) else type(router).__name__
            raise ValueError(
                f"{name}={value!r} is for the router that Megatron's arguments describe, but router={what} is given: "
                "leave one of them out, and give the router its options by router_options"
            )
