"""The place of MoE models in the Auto classes of transformers: beside the dense ones."""

import inspect
from importlib import import_module
from typing import Any

from transformers.models.auto.tokenization_auto import TOKENIZER_MAPPING_NAMES

from fastmoe.integrations.huggingface.config import CLASS_PREFIX, PREFIX, dense_config_class, lock
from fastmoe.integrations.huggingface.model import model_class_for

AUTO = "transformers.models.auto"
OTHERS = ("tokenization", "image_processing", "feature_extraction", "processing", "video_processing")

NOT_HERE = (ImportError, ValueError, AttributeError)  # of an entry whose class, or a library that it needs, is missing

_registered: set[type] = set()


def register_models(config_class: Any) -> None:
    """Make the MoE models of this configuration known to every Auto class that knows the dense ones, with the dense
    ones' tokenizers and processors.
    """
    with lock:
        if config_class in _registered:
            return
        dense = dense_config_class(config_class)
        for mapping in _mappings("modeling"):
            _add_models(mapping, dense, config_class)
        if dense.model_type in TOKENIZER_MAPPING_NAMES:
            TOKENIZER_MAPPING_NAMES[PREFIX + dense.model_type] = TOKENIZER_MAPPING_NAMES[dense.model_type]
        for kind in OTHERS:
            for mapping in _mappings(kind):
                _add_same(mapping, dense, config_class)
        _registered.add(config_class)


def _add_models(mapping: Any, dense: Any, config_class: Any) -> None:
    names, found = mapping._model_mapping, _entry(mapping, dense)
    if found is None:
        return
    classes = tuple(model_class_for(one) for one in (found if isinstance(found, tuple) else (found,)))
    mapping.register(config_class, classes if isinstance(found, tuple) else classes[0], exist_ok=True)
    if dense.model_type in names:  # Trainer and pipelines look class names up here
        name = names[dense.model_type]
        prefixed = CLASS_PREFIX + name if isinstance(name, str) else tuple(CLASS_PREFIX + one for one in name)
        names[PREFIX + dense.model_type] = prefixed


def _add_same(mapping: Any, dense: Any, config_class: Any) -> None:
    found = _entry(mapping, dense)
    if found is not None:
        mapping.register(config_class, found, exist_ok=True)


def _entry(mapping: Any, dense: Any) -> Any:
    """What a mapping has for a dense configuration class; None without one."""
    try:
        return mapping[dense]
    except (KeyError, *NOT_HERE):
        return None


def _mappings(kind: str) -> list[Any]:
    """The lazy mappings from configurations of one module of the Auto classes."""
    members = inspect.getmembers(import_module(f"{AUTO}.{kind}_auto"))
    found = (value for _, value in members if type(value).__name__ == "_LazyAutoMapping")
    return list({id(value): value for value in found}.values())
