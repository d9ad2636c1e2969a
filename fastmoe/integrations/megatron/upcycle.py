"""From one dense MLP of Megatron to the experts that take its place."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.transformer.mlp import MLP
from torch import Tensor, nn

from fastmoe._processes import Processes
from fastmoe.convert.upcycle import silence_shared_expert
from fastmoe.experts import MLPExperts, is_gated
from fastmoe.integrations.megatron.arguments import activation_of
from fastmoe.integrations.megatron.groups import Groups
from fastmoe.integrations.megatron.layer import FastMoELayer
from fastmoe.parallel.hidden import join_hidden, split_dimension


def dense_options(block: MLP, top_k: int, options: dict[str, Any]) -> dict[str, Any]:
    """The options of a layer whose experts can be copies of the block, and whose weights sum to 1 for each token.

    Raises:
        ValueError: an option that upcycling cannot follow.
    """
    config = block.config
    fc1, fc2 = block.linear_fc1, block.linear_fc2
    same = {
        "d_hidden": fc2.weight.shape[1] * block.tp_group.size(),
        "activation": activation_of(config, tanh=config.bias_activation_fusion),
        "bias": _bias(fc1) is not None or _bias(fc2) is not None,
    }
    if options.get("expert") is not None:
        raise ValueError("init='upcycle' makes the experts from the dense MLP; give expert= with init='random'")
    for name, value in same.items():
        if options.get(name) not in (None, value):
            raise ValueError(
                f"init='upcycle' copies the MLP, which has {name}={value!r}; got {name}={options[name]!r}. "
                "Leave it out, or use init='random'"
            )
    return options | same | _routing_options(config, top_k, options)


def _routing_options(config: Any, top_k: int, options: dict[str, Any]) -> dict[str, Any]:
    router, given = options.get("router"), dict(options.get("router_options") or {})
    if router == "soft":
        raise ValueError("a soft router gives experts means of tokens: use it with init='random'")
    if router not in (None, "topk") or config.moe_router_enable_expert_bias:
        return {}
    if given.get("normalize", True) is False or (
        config.moe_router_pre_softmax and top_k > 1 and "normalize" not in given
    ):
        raise ValueError(
            "init='upcycle' keeps the model's outputs, for which a token's routing weights must sum to 1: leave "
            "moe_router_pre_softmax and normalize=False out, or use init='random'"
        )
    if top_k == 1:
        given.setdefault("normalize", "stop_gradient")
    return {"router_options": given}


@torch.no_grad()
def copy_dense(layer: FastMoELayer, block: MLP) -> None:
    """Every expert becomes the dense MLP; a shared expert starts at zero."""
    moe, groups = layer.moe, layer.groups
    experts = moe.experts
    assert isinstance(experts, MLPExperts)
    fc1, fc2 = block.linear_fc1, block.linear_fc2
    for name, dense in (("w1", fc1.weight), ("b1", _bias(fc1)), ("w2", fc2.weight), ("b2", _bias(fc2))):
        stacked = getattr(experts, name)
        if stacked is None:
            continue
        if dense is None:
            stacked.zero_().requires_grad_(False)
        else:
            stacked.copy_(_here(dense, name, groups, is_gated(experts.activation)).expand_as(stacked))
            stacked.requires_grad_(dense.requires_grad)
    silence_shared_expert(moe)


def _bias(linear: nn.Module) -> Tensor | None:
    bias = getattr(linear, "bias", None)  # Transformer Engine has an empty one for none
    return bias if isinstance(bias, Tensor) and bias.numel() else None


def _here(dense: Tensor, name: str, groups: Groups, gated: bool) -> Tensor:
    """What an expert here has of a dense parameter, of which this process has a part.

    Where experts are split as the dense MLP is, that part; where they are whole, all parts.
    """
    dim = split_dimension(name)
    if groups.whole_sequence or groups.tp.size() == 1 or dim is None:
        return dense.detach()
    parts = Processes.of(groups.tp).gather(dense).unbind()
    return join_hidden(parts, dim - 1, halves=gated and name != "w2")
