"""Balance losses next to a model's own loss: of the same tokens, with a gradient multiplied by whatever that one's is.

A layer attaches its balance loss to its output, where nothing is known of what becomes of the main loss: Trainer and
accelerate divide it by the steps of gradient accumulation, a GradScaler multiplies it, and where Trainer counts the
items of all micro-batches a model's loss is its share of their mean. So the loss that a model returns is watched: in
backward it learns its multiplier first, and the layers, which come after, use it.
"""

import functools
import inspect
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.loss.loss_utils import LOSS_MAPPING, ForCausalLMLoss

from fastmoe._multiplier import write_multiplier
from fastmoe.model import moe_layers

IGNORED = -100  # the label of a token that is in no loss


class _Running(threading.local):
    """The passes that a thread is in, innermost last."""

    def __init__(self) -> None:
        self.passes: list[TrainingPass] = []


_running = _Running()


class TrainingPass:
    """One forward pass of a model in training, and what its layers are told meanwhile and when it is recomputed.

    Args:
        model: its MoE layers are those that are told; one whose multiplier the user has set keeps it.
        multiplier: of the balance losses, `share` unless the loss is watched.
        padding: bool `(B, S)`, False for padding; or None.
    """

    def __init__(self, model: nn.Module, multiplier: Tensor, padding: Tensor | None) -> None:
        self.layers = list(moe_layers(model).values())
        self.multiplier, self.padding = multiplier, padding

    @contextmanager
    def told(self) -> Iterator[None]:
        """The layers know of this pass inside."""
        before = [(layer, layer.aux_loss_scale, layer.token_mask) for layer in self.layers]
        for layer, scale, _ in before:
            layer.token_mask = self.padding
            if isinstance(scale, int | float) and scale == 1:
                layer.aux_loss_scale = self.multiplier
        _running.passes.append(self)
        try:
            yield
        finally:
            _running.passes.pop()
            for layer, scale, mask in before:
                layer.aux_loss_scale, layer.token_mask = scale, mask

    def recomputing(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """`function`, which belongs to this pass whenever it is called."""

        @functools.wraps(function)
        def belonging(*args: Any, **kwargs: Any) -> Any:
            with self.told():
                return function(*args, **kwargs)

        return belonging


@dataclass(frozen=True)
class Carrying:
    """An activation checkpointing function whose recomputation belongs to the pass that it recomputes."""

    checkpoint: Callable[..., Any]

    def __call__(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if _running.passes and not torch.compiler.is_compiling():
            function = _running.passes[-1].recomputing(function)
        return self.checkpoint(function, *args, **kwargs)


def run(model: Any, names: list[str], forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    """A model's `forward(*args, **kwargs)`, whose arguments have these names; inside another model's it is a part."""
    if not (model.training and torch.is_grad_enabled()) or _is_part(model):
        return forward(*args, **kwargs)
    given = dict(zip(names, args, strict=False)) | kwargs
    share = share_of(model, given).to(next(model.parameters()).device)
    multiplier = share.clone()
    if torch.compiler.is_compiling() and given.get("labels") is not None:
        multiplier = model.compiled_multiplier  # compiled code needs one that was there before
        share = write_multiplier(share, multiplier, torch.ones_like(share))
    padding = None if model.config.is_encoder_decoder else _padding_mask(given)
    with TrainingPass(model, multiplier, padding).told():
        output = forward(*args, **kwargs)
    if isinstance(output, dict):
        if isinstance(output.get("loss"), Tensor):
            output["loss"] = _watch(output["loss"], multiplier, share)
    elif given.get("labels") is not None and isinstance(output, tuple):
        output = (_watch(output[0], multiplier, share), *output[1:])
    return output


def _is_part(model: nn.Module) -> bool:
    """Whether the pass that is running is of a model that holds this one's layers."""
    if not _running.passes:
        return False
    layers = _running.passes[-1].layers
    return any(layer in layers for layer in moe_layers(model).values())


def _watch(loss: Tensor, multiplier: Tensor, share: Tensor) -> Tensor:
    return _Watch.apply(loss, multiplier, share) if loss.requires_grad and loss.dim() == 0 else loss


class _Watch(torch.autograd.Function):
    """The identity on the main loss; in backward `multiplier` becomes its gradient times `share`."""

    @staticmethod
    def forward(loss: Tensor, multiplier: Tensor, share: Tensor) -> Tensor:
        return loss.clone()  # Trainer multiplies it in place

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
        _loss, ctx.multiplier, ctx.share = inputs

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[no-untyped-def]
        return write_multiplier(grad, ctx.multiplier, ctx.share), None, None


def share_of(model: Any, given: dict[str, Any]) -> Tensor:
    """This forward pass's part of what one optimizer step is made of, as far as the loss that it returns is not divided
    by it afterwards.

    With `num_items_in_batch`, which Trainer gives, that is its labels among those of all micro-batches. Where Trainer
    computes the loss itself, from labels that the model is not given (label smoothing, `compute_loss_func`), it is one
    of the accumulated micro-batches, times the scale of Trainer's GradScaler.
    """
    total, labels = given.get("num_items_in_batch"), given.get("shift_labels")
    if labels is None and given.get("labels") is not None:
        labels = given["labels"][..., 1:] if _shifts_labels(model) else given["labels"]
    if labels is None:
        return torch.tensor(_share_in_trainer(), device="cpu")
    if total is None:
        return torch.ones((), device="cpu")
    items = (labels != IGNORED).sum()
    return (items / torch.as_tensor(total, device=items.device)).to(torch.float32)


def _shifts_labels(model: Any) -> bool:
    """Whether Trainer counts the labels from the second on."""
    shifts = LOSS_MAPPING.get(model.loss_type) is ForCausalLMLoss
    return shifts and not getattr(model.config, "is_encoder_decoder", False)


def _share_in_trainer() -> float:
    """What the Trainer that is calling, if one is, makes of a loss of its own."""
    module = sys.modules.get("transformers.trainer")
    frame = None if module is None or torch.compiler.is_compiling() else sys._getframe()
    while frame is not None:
        caller = frame.f_locals.get("self")
        if isinstance(caller, module.Trainer):  # type: ignore[union-attr]
            scaler = getattr(caller.accelerator, "scaler", None)
            scale = 1.0 if scaler is None else scaler.get_scale()
            return scale / getattr(caller, "current_gradient_accumulation_steps", 1)
        frame = frame.f_back
    return 1.0


def _padding_mask(given: dict[str, Any]) -> Tensor | None:
    """bool `(B, S)`, False for padding; None where none is given, or another kind of mask."""
    mask = given.get("attention_mask")
    return mask != 0 if isinstance(mask, Tensor) and mask.dim() == 2 else None


def argument_names(forward: Callable[..., Any]) -> list[str]:
    """The names of a method's arguments, `self` aside."""
    return list(inspect.signature(forward).parameters)[1:]
