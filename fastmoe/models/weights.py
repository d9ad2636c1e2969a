"""The weights of the language models: how they start, and one matrix in two places."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from fastmoe.routers import Router

RESIDUAL_OUTPUTS = ("c_proj.weight", "experts.w2", "shared.w2.weight")
BIASES = ("bias", "b1", "b2")


@torch.no_grad()
def draw_weights(model: nn.Module, std: float, residual_std: float) -> None:
    """Draw every matrix from N(0, std), what writes into the residual stream from N(0, residual_std); biases are 0.

    Experts included. Norms start at one; a router that has a start of its own (`own_init`) at that. An LSTM keeps its
    values, and so does a vector, but no matrix, of a module that is not known here.
    """
    for name, parameter in model.named_parameters():
        owner, _, last = name.rpartition(".")
        if isinstance(model.get_submodule(owner), nn.RNNBase):
            continue
        if last in BIASES:
            parameter.zero_()
        elif parameter.ndim > 1:
            parameter.normal_(std=residual_std if name.endswith(RESIDUAL_OUTPUTS) else std)
    for module in model.modules():
        if isinstance(module, nn.LayerNorm | nn.RMSNorm):
            module.reset_parameters()
        elif isinstance(module, Router):
            _restart(module)


def _restart(router: Router) -> None:
    """Buffers included; parameters keep what was drawn unless the router has a start of its own."""
    drawn = [] if router.own_init else [(parameter, parameter.clone()) for parameter in router.parameters()]
    router.reset_parameters()
    for parameter, value in drawn:
        parameter.copy_(value)


def is_tied(model: Any) -> bool:
    """Whether a GPT's head has its embedding's matrix; a head that was replaced, pruned or quantized has not."""
    return getattr(model.head, "weight", None) is model.token_embedding.weight


def tie(model: Any) -> None:
    model.head.weight = model.token_embedding.weight


def accept_one_matrix(model: Any, state: dict[str, Any], prefix: str, *_: object) -> None:
    """A tied model loads the one matrix under both its names, or under the embedding's alone.

    Raises:
        ValueError: the two are not equal, as those of an untied model.
    """
    model.tied_before_load = is_tied(model)
    embedding, head = f"{prefix}token_embedding.weight", f"{prefix}head.weight"
    if not model.tied_before_load or embedding not in state:
        return
    head_VD = state.setdefault(head, state[embedding])
    if not head_VD.is_meta and not torch.equal(head_VD.nan_to_num(), state[embedding].nan_to_num()):
        raise ValueError(f"tied=True wants one matrix for embedding and head; got {embedding} and {head} that differ")


def tie_again(model: Any, *_: object) -> None:
    """`load_state_dict(assign=True)` makes two matrices of one."""
    if model.tied_before_load:
        tie(model)
