"""Model classes of MoE models that were dense, made from the dense classes."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import PretrainedConfig, PreTrainedModel

from fastmoe.integrations.huggingface.balance import Carrying, argument_names, run
from fastmoe.integrations.huggingface.config import (
    CLASS_PREFIX,
    MoEConfig,
    config_class_for,
    lock,
    made,
    moe_config,
    replace_config,
)
from fastmoe.integrations.huggingface.describe import build, describe
from fastmoe.layer import MoE
from fastmoe.model import moe_layers
from fastmoe.token_ids import feed_token_ids


class MoEModel:
    """Mixed into a dense model class: its MoE layers are those that `config.fastmoe` describes."""

    dense_class: type
    _weight_conversions: list[Any]
    compiled_multiplier: torch.Tensor

    def __init__(self: Any, config: PretrainedConfig, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)  # type: ignore[call-arg]
        for layer in build(self, config.fastmoe["layers"]):
            _initialise(layer, config)
        finish(self)

    def _set_gradient_checkpointing(
        self, enable: bool = True, gradient_checkpointing_func: Callable[..., Any] = checkpoint, **more: Any
    ) -> None:
        super()._set_gradient_checkpointing(enable, Carrying(gradient_checkpointing_func), **more)  # type: ignore[misc]

    def save_pretrained(self: Any, *args: Any, **kwargs: Any) -> Any:
        """As of every model of transformers.

        Raises:
            ValueError: a layer that the configuration cannot describe; experts that are spread over processes.
        """
        spread = max((layer.experts.spread_over for layer in moe_layers(self).values()), default=1)
        if spread > 1:
            raise ValueError(
                f"experts are spread over {spread} processes: use fastmoe.save, and `fastmoe consolidate` for one file"
            )
        try:
            described = {"layers": describe(self)}
        except ValueError as error:
            raise ValueError(
                f"{error}: from_pretrained could not build it again. Save the state_dict, or use fastmoe.save"
            ) from None
        before, self.config.fastmoe = self.config.fastmoe, described
        try:
            return super().save_pretrained(*args, **kwargs)  # type: ignore[misc]
        finally:
            self.config.fastmoe = before

    @classmethod
    def from_pretrained(cls: Any, *args: Any, output_loading_info: bool = False, **kwargs: Any) -> Any:
        """As of every model of transformers.

        Raises:
            ValueError: weights of a MoE layer that are not in the checkpoint, or have another shape there.
        """
        model, info = super().from_pretrained(*args, output_loading_info=True, **kwargs)  # type: ignore[misc]
        inside = tuple(f"{name}." for name in moe_layers(model))
        other_shapes = [name for name, *_ in info["mismatched_keys"]]
        missing = sorted(name for name in (*info["missing_keys"], *other_shapes) if name.startswith(inside))
        if missing:
            raise ValueError(f"the checkpoint lacks weights of MoE layers: {', '.join(missing)}")
        return (model, info) if output_loading_info else model

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        reduced: Any = super().__reduce_ex__(protocol)
        made_by, (_, *more), *rest = reduced
        return _remade, (made_by, self.dense_class, *more), *rest


def model_class_for(dense: Any) -> Any:
    """The class of MoE models that were made from `dense` ones."""
    with lock:
        if dense not in made:
            body = {
                "__module__": __name__,
                "__doc__": f"A `{dense.__name__}` with MoE layers.",
                "_auto_class": None,
                "config_class": config_class_for(dense.config_class),
                "dense_class": dense,
                "forward": _forward_for(dense.forward),
            }
            made[dense] = type(CLASS_PREFIX + dense.__name__, (MoEModel, dense), body)
        return made[dense]


def _forward_for(dense_forward: Callable[..., Any]) -> Callable[..., Any]:
    names = argument_names(dense_forward)

    @functools.wraps(dense_forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return run(self, names, functools.partial(dense_forward, self), args, kwargs)

    return forward


@torch.no_grad()
def _initialise(layer: MoE, config: PretrainedConfig) -> None:
    """Fresh experts as transformers starts linear layers; a router keeps its own start."""
    std = getattr(config, "initializer_range", None) or 0.02
    for part in (layer.experts, layer.shared):
        for name, parameter in () if part is None else part.named_parameters():
            if name.startswith("b") or name.endswith("bias"):
                parameter.zero_()
            else:
                parameter.normal_(0, std)


def _remade(made_by: Any, dense: Any, *more: Any) -> Any:
    return made_by(model_class_for(dense), *more)


def models_with_layers(model: nn.Module) -> list[PreTrainedModel]:
    """The models of transformers in `model` that hold MoE layers, outer ones first."""
    models = (module for module in model.modules() if isinstance(module, PreTrainedModel))
    return [module for module in models if moe_layers(module)]


def make_moe(model: PreTrainedModel, root: nn.Module) -> None:
    """Give a model with MoE layers the class and the configuration of one.

    `root` is what `model` is in: configurations in it may hold that of `model`.
    """
    if not isinstance(model.config, MoEConfig):
        replace_config(root, model, moe_config(model.config))
    model.__class__ = model_class_for(type(model))
    model.config.use(type(model.config))


def describe_in_config(model: PreTrainedModel) -> None:
    """Let its configuration say which its MoE layers are."""
    try:
        model.config.fastmoe = {"layers": describe(model)}
    except ValueError:
        model.config.fastmoe = {"layers": []}  # said again, with the reason, when it is saved


def finish(model: Any) -> None:
    """What a MoE model, and each one inside it, has besides its layers."""
    for inner in models_with_layers(model):
        if inner is not model and not isinstance(inner, MoEModel) and type(inner).config_class is not None:
            make_moe(inner, model)
            if inner.config is not model.config:
                describe_in_config(inner)
    for module in model.modules():
        if isinstance(module, MoEModel):
            module._weight_conversions = []  # saved under the names it has
            module.compiled_multiplier = torch.ones((), device="cpu")  # models are built on the meta device too
        checkpointing = getattr(module, "_gradient_checkpointing_func", None)
        if checkpointing is not None and not isinstance(checkpointing, Carrying):
            module._gradient_checkpointing_func = Carrying(checkpointing)
    if any(getattr(layer.router, "needs_token_ids", False) for layer in moe_layers(model).values()):
        feed_token_ids(model, model.get_input_embeddings())
