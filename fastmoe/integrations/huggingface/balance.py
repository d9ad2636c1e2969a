"""Balance losses next to a model's own loss: of the same tokens, with a gradient multiplied by whatever that one's is.

A layer attaches its balance loss to its output, where nothing is known of what becomes of the main loss: Trainer and
accelerate divide it by the steps of gradient accumulation, a GradScaler multiplies it, and where Trainer counts the
items of all micro-batches a model's loss is its share of their mean. So the loss that a model returns is watched: in
backward it learns its multiplier first, and the layers, which come after, use it.
"""

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.loss.loss_utils import LOSS_MAPPING, ForCausalLMLoss

from fastmoe.model import moe_layers

IGNORED = -100  # the label of a token that is in no loss


class LossScale:
    """What one model's layers are told: the multiplier of their balance losses, a tensor that they read in backward,
    and in training which tokens are padding.
    """

    def __init__(self, model: nn.Module) -> None:
        self.value = torch.ones((), device="cpu")  # a model that is being loaded is built on the meta device
        self.layers = list(moe_layers(model).values())
        for layer in self.layers:
            layer.aux_loss_scale = self.value

    def around(self, model: Any, names: list[str], forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """A model's `forward(*args, **kwargs)`, whose arguments have these names."""
        given = dict(zip(names, args, strict=False)) | kwargs
        padding = None if not model.training or model.config.is_encoder_decoder else _mask_of(given)
        for layer in self.layers:
            layer.token_mask = padding
        if not (model.training and torch.is_grad_enabled()):
            return forward(*args, **kwargs)
        share = share_of_items(model, given).to(next(model.parameters()).device)
        if not torch.compiler.is_compiling() and self.value.device != share.device:
            self.value.data = self.value.to(share.device)
        with torch.no_grad():
            self.value.copy_(share)
        output = forward(*args, **kwargs)
        labelled = given.get("labels") is not None
        if isinstance(output, dict):
            if isinstance(output.get("loss"), Tensor):
                output["loss"] = self._watch(output["loss"], share)
        elif labelled and isinstance(output, tuple):
            output = (self._watch(output[0], share), *output[1:])
        return output

    def _watch(self, loss: Tensor, share: Tensor) -> Tensor:
        return _Watch.apply(loss, self.value, share) if loss.requires_grad and loss.dim() == 0 else loss


class _Watch(torch.autograd.Function):
    """The identity on the main loss; in backward `scale` becomes its gradient times `share`."""

    @staticmethod
    def forward(loss: Tensor, scale: Tensor, share: Tensor) -> Tensor:
        return loss.clone()  # Trainer multiplies it in place

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
        _loss, ctx.scale, ctx.share = inputs

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[no-untyped-def]
        ctx.scale.copy_(grad * ctx.share)
        return grad, None, None


def share_of_items(model: Any, given: dict[str, Any]) -> Tensor:
    """This forward pass's part of the items that a loss is divided by; 1 where it is divided by its own.

    `num_items_in_batch`, which Trainer gives, counts the labels of all micro-batches. Where the labels are kept from
    the model (label smoothing, a loss of one's own), its tokens are counted in their stead.
    """
    total = given.get("num_items_in_batch")
    if total is None:
        return torch.ones(())
    if given.get("shift_labels") is not None:
        items = (given["shift_labels"] != IGNORED).sum()
    elif given.get("labels") is not None:
        labels = given["labels"]
        items = ((labels[..., 1:] if _shifts_labels(model) else labels) != IGNORED).sum()
    else:
        mask = _token_mask(given)
        items = (mask[..., 1:] if _shifts_labels(model) else mask).sum()
    share = items / torch.as_tensor(total, device=items.device)
    return share.clamp(max=1).to(torch.float32)


def _shifts_labels(model: Any) -> bool:
    """Whether Trainer counts the labels from the second on."""
    shifts = LOSS_MAPPING.get(model.loss_type) is ForCausalLMLoss
    return shifts and not getattr(model.config, "is_encoder_decoder", False)


def _mask_of(given: dict[str, Any]) -> Tensor | None:
    """bool `(B, S)`, False for padding; None where none is given, or another kind of mask."""
    mask = given.get("attention_mask")
    return mask != 0 if isinstance(mask, Tensor) and mask.dim() == 2 else None


def _token_mask(given: dict[str, Any]) -> Tensor:
    mask = _mask_of(given)
    if mask is not None:
        return mask
    tokens = next(given[name] for name in ("input_ids", "inputs_embeds", "pixel_values") if given.get(name) is not None)
    return torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device)


def argument_names(forward: Callable[..., Any]) -> list[str]:
    """The names of a method's arguments, `self` aside."""
    return list(inspect.signature(forward).parameters)[1:]
