"""Models with fastmoe's layers in them, by name, for the functions that train. Called only where Megatron-Core runs."""

from megatron_models import own_spec


def layer_spec(config):
    """Depth B: every MLP a `FastMoELayer`."""
    return with_options(config)


def with_options(config, **options):
    """As `layer_spec`, with options of `fastmoe.MoE`."""
    from fastmoe.integrations.megatron import gpt_layer_spec

    return gpt_layer_spec(config.num_moe_experts, layer_spec=own_spec(config), **options)


def experts_spec(config):
    """Depth C: Megatron's MoELayer around `FastMoEExperts`."""
    from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules
    from megatron.core.transformer.spec_utils import ModuleSpec

    from fastmoe.integrations.megatron import FastMoEExperts

    spec = own_spec(config)
    made = getattr(spec.submodules.mlp, "submodules", None) or spec.submodules.mlp.keywords["submodules"]
    parts = MoESubmodules(experts=FastMoEExperts, shared_experts=made.shared_experts)
    spec.submodules.mlp = ModuleSpec(module=MoELayer, submodules=parts)
    return spec


def dense_spec(config):
    """Megatron's dense layers, whatever the configuration says of experts."""
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec

    return get_gpt_layer_local_spec()


def fresh(model):
    """Depth A, with experts that are no copies: the tests give them values anyway."""
    from fastmoe.integrations.megatron import moefy

    return moefy(model, num_experts=4, top_k=2, init="random")
