"""Tiny models of Megatron-Core, and tokens for them. Imported anywhere; called only where Megatron-Core runs."""

import torch

LENGTH, VOCABULARY = 16, 64

DEFAULTS = {
    "num_layers": 2,
    "hidden_size": 32,
    "ffn_hidden_size": 48,
    "num_attention_heads": 4,
    "num_moe_experts": 4,
    "moe_router_topk": 2,
    "moe_router_load_balancing_type": "none",  # a balance loss depends on which tokens are on one process
    "moe_token_dispatcher_type": "alltoall",
    "add_bias_linear": False,
    "hidden_dropout": 0.0,
    "attention_dropout": 0.0,
    "use_cpu_initialization": True,
}


def config(**overrides):
    """Megatron's configuration, in the layout that `run` was asked for."""
    from megatron.core import parallel_state
    from megatron.core.transformer import TransformerConfig

    sizes = {
        "tensor_model_parallel_size": parallel_state.get_tensor_model_parallel_world_size(),
        "pipeline_model_parallel_size": parallel_state.get_pipeline_model_parallel_world_size(),
        "expert_model_parallel_size": parallel_state.get_expert_model_parallel_world_size(),
        "expert_tensor_parallel_size": parallel_state.get_expert_tensor_parallel_world_size(),
    }
    options = DEFAULTS | sizes | overrides
    options.setdefault("pipeline_dtype", options.get("params_dtype", torch.float32))
    return TransformerConfig(**options)


def gpt(overrides=None, spec=None):
    """A GPTModel with Megatron's own MoELayer, or with the layers that `spec(config)` gives."""
    from megatron.core import parallel_state
    from megatron.core.models.gpt import GPTModel

    chosen = config(**(overrides or {}))
    return GPTModel(
        chosen,
        (spec or own_spec)(chosen),
        vocab_size=VOCABULARY,
        max_sequence_length=LENGTH,
        pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=parallel_state.is_pipeline_last_stage(),
    )


def own_spec(chosen):
    """Megatron's layers of plain PyTorch."""
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec

    return get_gpt_layer_local_spec(num_experts=chosen.num_moe_experts)


def dense(overrides=None, spec=None):
    """A GPTModel without MoE."""
    return gpt({"num_moe_experts": None, **(overrides or {})}, spec)


def batch(number, size=4):
    """Token ids and labels of this process's share of `size` sequences, the same tokens in any layout."""
    from megatron.core import parallel_state

    generator = torch.Generator().manual_seed(number)
    drawn = torch.randint(VOCABULARY, (size, LENGTH + 1), generator=generator)
    share = drawn.chunk(parallel_state.get_data_parallel_world_size())[parallel_state.get_data_parallel_rank()]
    return {"tokens": share[:, :-1].contiguous(), "labels": share[:, 1:].contiguous()}


def loss_of(model, given):
    """The loss of each token of a batch, (sequences, LENGTH); the hidden states, where the model goes on elsewhere."""
    positions = torch.arange(LENGTH).expand_as(given["tokens"])
    return model(given["tokens"], positions, None, labels=given["labels"])
