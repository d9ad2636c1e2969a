"""Megatron's arguments in fastmoe's words: those that are read, those that mean nothing here, those that it lacks."""

from __future__ import annotations

import copy
import inspect
import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch.nn.functional as F

from fastmoe._errors import unknown_name
from fastmoe.integrations.megatron.routing import router_options
from fastmoe.layer import MoE

if TYPE_CHECKING:
    from megatron.core.transformer.transformer_config import TransformerConfig

logger = logging.getLogger("fastmoe")

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
    for module in ("moe_act", "shared_experts"):
        if config.recompute_granularity == "selective" and module in (config.recompute_modules or []):
            raise ValueError(f"recompute_modules: {module} is of Megatron's own layer; take 'moe', got {module!r}")
    if getattr(config, "fp8", None) or getattr(config, "fp4", None):
        logger.warning("FastMoELayer: router and experts compute in %s, whatever fp8 and fp4 say", config.params_dtype)
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
    return options | router_options(config, options)


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
