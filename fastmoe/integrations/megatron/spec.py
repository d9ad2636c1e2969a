"""Layer specs with FastMoE layers in them."""

from __future__ import annotations

import copy
from typing import Any

from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.spec_utils import ModuleSpec

from fastmoe.integrations.megatron.layer import FastMoELayer


def gpt_layer_spec(num_experts: int, top_k: int | None = None, *, layer_spec: Any = None, **moe_options: Any) -> Any:
    """The spec of a GPT layer, or of a block of them, with a `FastMoELayer` where the feed-forward block stands.

    Args:
        num_experts, top_k, moe_options: as of `FastMoELayer`.
        layer_spec: a layer's spec, whose `mlp` is replaced in a copy; or a block's, as of `get_gpt_decoder_block_spec`,
            in which every MoE layer is. None: Megatron's own, with Transformer Engine where it is installed.

    Raises:
        ValueError: a layer without a norm in front of its MLP, because Transformer Engine has it inside; a block
            without any MoE layer.
    """
    if layer_spec is None:
        layer_spec = _own_spec(num_experts)
    spec = copy.deepcopy(layer_spec)
    mlp = ModuleSpec(module=FastMoELayer, params={"num_experts": num_experts, "top_k": top_k, **moe_options})
    in_block = getattr(spec, "layer_specs", None)
    if in_block is None:
        return _with_mlp(spec, mlp)
    experts = [layer for layer in in_block if _is_moe(layer.submodules.mlp)]
    if not experts:
        raise ValueError("the block has no MoE layer: build its spec with num_moe_experts and moe_layer_freq")
    for layer in experts:
        _with_mlp(layer, mlp)
    return spec


def _own_spec(num_experts: int) -> ModuleSpec:
    from megatron.core.extensions.transformer_engine import HAVE_TE

    make = get_gpt_layer_with_transformer_engine_spec if HAVE_TE else get_gpt_layer_local_spec
    return make(num_experts=num_experts)


def _with_mlp(layer: ModuleSpec, mlp: ModuleSpec) -> ModuleSpec:
    parts = layer.submodules
    if parts.pre_mlp_layernorm is IdentityOp:
        raise ValueError(
            "the layer's norm is inside its dense MLP: make the spec with num_experts=, which puts it in front"
        )
    parts.mlp = mlp
    return layer


def _is_moe(mlp: Any) -> bool:
    made = getattr(mlp, "module", None) or getattr(mlp, "func", None)
    return isinstance(made, type) and issubclass(made, MoELayer)
