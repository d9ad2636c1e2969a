"""The table of dense families of transformers that have a MoE family of the same attention, norms and residuals."""

from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel

from fastmoe.integrations.huggingface.native_layer import NativeLayer


@dataclass(frozen=True)
class Family:
    """A row: a MoE family, and what it calls the things that others call otherwise.

    Args:
        dense, native: what the names of the classes of both families begin with.
        num_experts, d_hidden: names of these fields in the MoE family's config.
        block: what a MoE block is called inside a decoder layer.
        router: what the router's matrix is called inside a block.
        without_effect: fields that only the dense family's config has, whatever their value.
    """

    dense: str
    native: str
    num_experts: str = "num_experts"
    d_hidden: str = "intermediate_size"
    block: str = "mlp"
    router: str = "gate.weight"
    without_effect: tuple[str, ...] = ()


FAMILIES = {
    "llama": Family("Llama", "Mixtral", "num_local_experts", without_effect=("pretraining_tp",)),
    "mistral": Family("Mistral", "Mixtral", "num_local_experts"),
    "qwen2": Family("Qwen2", "Qwen2Moe", d_hidden="moe_intermediate_size"),
    "qwen3": Family("Qwen3", "Qwen3Moe", d_hidden="moe_intermediate_size", without_effect=("max_window_layers",)),
    "granite": Family("Granite", "GraniteMoe", "num_local_experts", block="block_sparse_moe", router="router.weight"),
    "granite_swa": Family(
        "GraniteSWA", "GraniteMoeSWA", "num_local_experts", block="block_sparse_moe", router="router.weight"
    ),
    "olmo2": Family("Olmo2", "FlexOlmo"),
}

CARRIED_IF_THERE = ("head_dim",)  # attention reads it in every family, whether or not the config declares it
NOT_CARRIED = ("transformers_version", "architectures", "layer_types")
EMPTY_SHARED_D_HIDDEN = 64  # divides well among processes, and is nothing beside the experts


def config_of_native(
    dense: PreTrainedConfig,
    dense_class: type[PreTrainedModel],
    native_class: type[PreTrainedModel],
    family: Family,
    layer: NativeLayer,
    dense_layers: list[int],
) -> PreTrainedConfig:
    """The MoE family's config of a model whose layers are dense by these numbers and otherwise like `layer`.

    Raises:
        ValueError: a setting of the dense config, or of the layers, that the MoE family does not know.
    """
    dense_config, native_config = dense_class.config_class, native_class.config_class
    assert dense_config is not None
    assert native_config is not None
    known = {field.name for field in fields(native_config)}
    values = _carried(dense, dense_config, known, family)
    num_moe = dense.num_hidden_layers - len(dense_layers)
    values |= {
        family.num_experts: layer.num_experts,
        family.d_hidden: layer.d_hidden,
        "num_experts_per_tok": layer.top_k,
        "hidden_act": layer.hidden_act,
        "router_aux_loss_coef": layer.aux_loss_weight * num_moe / layer.top_k,
    }
    values |= _where_known(known, family, layer, dense_layers)
    if dense_layers and dense.hidden_act != layer.hidden_act:
        raise ValueError(
            f"the layers left dense have hidden_act={dense.hidden_act!r}, the experts {layer.hidden_act!r}; "
            f"a {family.native} model has one for both"
        )
    return native_config(**values)


def _carried(
    dense: PreTrainedConfig, dense_class: type[PreTrainedConfig], known: Iterable[str], family: Family
) -> dict[str, Any]:
    """The dense config's settings; `ValueError` for one that would be lost and is not what it is by default."""
    values = {name: getattr(dense, name) for name in CARRIED_IF_THERE if getattr(dense, name, None) is not None}
    for field in fields(dense_class):
        value = getattr(dense, field.name)
        if field.name in known and field.name not in NOT_CARRIED:
            values[field.name] = value
        elif field.name not in (*NOT_CARRIED, *CARRIED_IF_THERE, *family.without_effect) and value != field.default:
            raise ValueError(
                f"{field.name}={value!r} of the {family.dense} config: {family.native} knows no such setting"
            )
    return values | _windows(dense, known, family)


def _windows(dense: PreTrainedConfig, known: Iterable[str], family: Family) -> dict[str, Any]:
    """Which layers attend to a sliding window."""
    layer_types = getattr(dense, "layer_types", None)
    if layer_types is None:
        return {}
    if "layer_types" in known:
        return {"layer_types": layer_types}
    if len(set(layer_types)) > 1:
        raise ValueError(f"layer_types={layer_types}: {family.native} has one kind of attention in all layers")
    return {"use_sliding_window": "sliding_attention" in layer_types}


def _where_known(known: Iterable[str], family: Family, layer: NativeLayer, dense_layers: list[int]) -> dict[str, Any]:
    """The settings that some MoE families have; `ValueError` where one is needed and missing."""
    values: dict[str, Any] = {}
    if "norm_topk_prob" in known:
        values["norm_topk_prob"] = layer.normalized
    elif not layer.normalized:
        raise ValueError(f"a token's routing weights do not sum to 1 (normalize=False); those of {family.native} do")
    if "mlp_only_layers" in known:
        values |= {"mlp_only_layers": dense_layers, "decoder_sparse_step": 1}
    elif dense_layers:
        raise ValueError(f"layers {dense_layers} are dense; every layer of a {family.native} model is a MoE")
    if "shared_expert_intermediate_size" in known:
        values["shared_expert_intermediate_size"] = layer.shared_d_hidden or EMPTY_SHARED_D_HIDDEN
    elif layer.shared_d_hidden:
        raise ValueError(f"the layers have a shared expert, and {family.native} has none")
    return values
