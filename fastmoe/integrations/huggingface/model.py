"""Model classes of MoE models that were dense, made from the dense classes, and their place in the Auto classes."""

import functools
import inspect
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from transformers import PretrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto

from fastmoe.integrations.huggingface.balance import LossScale, argument_names
from fastmoe.integrations.huggingface.config import CLASS_PREFIX, PREFIX, config_class_for, dense_config_class
from fastmoe.integrations.huggingface.describe import build, describe
from fastmoe.layer import MoE
from fastmoe.token_ids import feed_token_ids


class MoEModel:
    """Mixed into a dense model class: its MoE layers are those that `config.fastmoe` describes."""

    def __init__(self: Any, config: PretrainedConfig, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)  # type: ignore[call-arg]
        for layer in build(self.base_model, config.fastmoe["layers"]):
            _initialise(layer, config)
        finish(self)

    def save_pretrained(self: Any, *args: Any, **kwargs: Any) -> Any:
        """As of every model of transformers.

        Raises:
            ValueError: a layer that the configuration cannot describe; experts that are spread over processes.
        """
        spread = max(layer.experts.spread_over for layer in self.modules() if isinstance(layer, MoE))
        if spread > 1:
            raise ValueError(
                f"experts are spread over {spread} processes: use fastmoe.save, and `fastmoe consolidate` for one file"
            )
        try:
            self.config.fastmoe = {"layers": describe(self.base_model)}
        except ValueError as error:
            raise ValueError(
                f"{error}: from_pretrained could not build it again. Save the state_dict, or use fastmoe.save"
            ) from None
        return super().save_pretrained(*args, **kwargs)  # type: ignore[misc]

    @classmethod
    def from_pretrained(cls: Any, *args: Any, output_loading_info: bool = False, **kwargs: Any) -> Any:
        """As of every model of transformers.

        Raises:
            ValueError: weights of a MoE layer that are not in the checkpoint.
        """
        model, info = super().from_pretrained(*args, output_loading_info=True, **kwargs)  # type: ignore[misc]
        inside = tuple(f"{name}." for name, module in model.named_modules() if isinstance(module, MoE))
        missing = sorted(name for name in info["missing_keys"] if name.startswith(inside))
        if missing:
            raise ValueError(f"the checkpoint lacks weights of MoE layers: {', '.join(missing)}")
        return (model, info) if output_loading_info else model


def finish(model: Any) -> None:
    """What every MoE model has besides its layers."""
    model._weight_conversions = []  # saved under the names it has
    model.loss_scale = LossScale(model)
    if any(getattr(layer.router, "needs_token_ids", False) for layer in model.modules() if isinstance(layer, MoE)):
        feed_token_ids(model, model.get_input_embeddings())


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
    for module in layer.modules():
        module._is_hf_initialized = True  # type: ignore[assignment]


def _make_model_class(dense: Any) -> type[PreTrainedModel]:
    """The class of MoE models that were made from `dense` ones."""

    names = argument_names(dense.forward)

    @functools.wraps(dense.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return self.loss_scale.around(self, names, functools.partial(dense.forward, self), args, kwargs)

    body = {
        "__module__": __name__,
        "__doc__": f"A `{dense.__name__}` with MoE layers.",
        "config_class": config_class_for(dense.config_class),
        "forward": forward,
    }
    return type(CLASS_PREFIX + dense.__name__, (MoEModel, dense), body)


model_class_for: Callable[[Any], type[PreTrainedModel]] = cache(_make_model_class)


def _register_models(config_class: Any) -> None:
    """Make the MoE models of this configuration known to every Auto class that knows the dense ones."""
    dense_type = dense_config_class(config_class).model_type
    for auto in _auto_classes():
        names = auto._model_mapping._model_mapping
        if dense_type not in names:
            continue
        found = auto._model_mapping[dense_config_class(config_class)]
        classes = tuple(model_class_for(dense) for dense in (found if isinstance(found, tuple) else (found,)))
        auto._model_mapping.register(config_class, classes if isinstance(found, tuple) else classes[0], exist_ok=True)
        # Trainer and pipelines look class names up here.
        names[PREFIX + dense_type] = (
            CLASS_PREFIX + names[dense_type]
            if isinstance(names[dense_type], str)
            else tuple(CLASS_PREFIX + name for name in names[dense_type])
        )


register_models: Callable[[Any], None] = cache(_register_models)


def _auto_classes() -> list[Any]:
    found = (value for _, value in inspect.getmembers(modeling_auto, inspect.isclass))
    return [value for value in found if getattr(value, "_model_mapping", None) is not None]


def __getattr__(name: str) -> Any:
    """`FastMoE<Model>`, for pickle."""
    import transformers

    dense = getattr(transformers, name.removeprefix(CLASS_PREFIX), None) if name.startswith(CLASS_PREFIX) else None
    if dense is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return model_class_for(dense)
