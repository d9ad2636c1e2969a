"""A tiny hybrid model of Megatron-Core: layers of attention, of MLPs and of experts, each on its own."""

from dataclasses import replace

from megatron_models import LENGTH, VOCABULARY, config, own_spec

PATTERN = "*-*E"


def hybrid(overrides=None, spec=None):
    """HybridModel, or MambaModel as it was called. `spec(config)`: a GPT layer whose MLP the E layers take."""
    from megatron.core import parallel_state

    chosen = config(**{"num_layers": len(PATTERN), **(overrides or {})})
    model, stack, pattern = _classes()
    return model(
        chosen,
        _stack_spec(stack, chosen, spec or own_spec),
        VOCABULARY,
        LENGTH,
        pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=parallel_state.is_pipeline_last_stage(),
        **{pattern: PATTERN},
    )


def _classes():
    """The model, the module of its block, and what it calls its pattern."""
    try:
        from megatron.core.models.hybrid import hybrid_block
        from megatron.core.models.hybrid.hybrid_model import HybridModel

        return HybridModel, hybrid_block, "hybrid_layer_pattern"
    except ImportError:
        from megatron.core.models.mamba import MambaModel
        from megatron.core.ssm import mamba_block

        return MambaModel, mamba_block, "hybrid_override_pattern"


def _stack_spec(block, chosen, spec):
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.ssm.mlp_layer import MLPLayer
    from megatron.core.transformer.identity_op import IdentityFuncOp, IdentityOp
    from megatron.core.transformer.spec_utils import ModuleSpec
    from megatron.core.transformer.torch_norm import WrappedTorchNorm
    from megatron.core.transformer.transformer_layer import MoETransformerLayer, TransformerLayer

    block.TENorm = WrappedTorchNorm  # its last norm is TransformerEngine's, whatever the specs say
    plain = get_gpt_layer_local_spec().submodules
    no_mlp = {"pre_mlp_layernorm": IdentityOp, "mlp": IdentityOp, "mlp_bda": IdentityFuncOp}
    no_attention = {"input_layernorm": IdentityOp, "self_attention": IdentityOp, "self_attn_bda": IdentityFuncOp}
    layers = {
        "attention_layer": ModuleSpec(module=TransformerLayer, submodules=replace(plain, **no_mlp)),
        "mlp_layer": ModuleSpec(module=MLPLayer, submodules=replace(plain, **no_attention)),
        "moe_layer": ModuleSpec(
            module=MoETransformerLayer, submodules=replace(spec(chosen).submodules, **no_attention)
        ),
    }
    return ModuleSpec(module=block.MambaStack, submodules=block.MambaStackSubmodules(**layers))
