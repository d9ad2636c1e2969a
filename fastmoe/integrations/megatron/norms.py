"""The norm in front of an MLP, where Transformer Engine has it inside the MLP's first matrix."""

from __future__ import annotations

import torch
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP
from torch import nn


def check_norm(parent: nn.Module, block: MLP) -> None:
    """Raises:
    ValueError: the norm in front is inside the block, and the layer around it has no place for it.
    """
    inside = getattr(block.linear_fc1, "layer_norm_weight", None) is not None
    if inside and not isinstance(getattr(parent, "pre_mlp_layernorm", None), IdentityOp):
        raise ValueError(f"{type(parent).__name__} has no pre_mlp_layernorm to take the norm that is in linear_fc1")


@torch.no_grad()
def norm_before(parent: nn.Module, block: MLP) -> None:
    """Give the layer around `block` the norm that goes with it, if the block has it inside."""
    weight = getattr(block.linear_fc1, "layer_norm_weight", None)
    if weight is None:
        return
    norm = _norm_class()(block.config, block.config.hidden_size, block.config.layernorm_epsilon)
    norm.to(weight.device, weight.dtype)
    for name in ("weight", "bias"):
        inside = getattr(block.linear_fc1, f"layer_norm_{name}", None)
        if inside is not None:
            own = getattr(norm, name)
            own.copy_(inside)
            own.requires_grad_(inside.requires_grad)
            own.sequence_parallel = block.config.sequence_parallel
    parent.pre_mlp_layernorm = norm


def _norm_class() -> type:
    from megatron.core.extensions.transformer_engine import HAVE_TE, TENorm
    from megatron.core.transformer.torch_norm import WrappedTorchNorm

    return TENorm if HAVE_TE else WrappedTorchNorm
