"""Features of Megatron-Core around a model, one at a time. Called only where Megatron-Core runs."""

import torch
from layer_cases import metrics
from megatron_models import LENGTH, VOCABULARY, batch, config, gpt, loss_of, own_spec
from megatron_training import forward_backward
from megatron_values import fill, sharded
from model_cases import layer_spec

GATED = {"gated_linear_unit": True, "activation_func": torch.nn.functional.silu}
BALANCED = {"moe_router_load_balancing_type": "aux_loss", "moe_aux_loss_coeff": 0.05, "moe_z_loss_coeff": 0.01}


def multi_token_prediction():
    """Metrics of a model of two layers and one for multi-token prediction, and the gradients of all routers."""
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_mtp_block_spec

    chosen = config(**GATED, **BALANCED, mtp_num_layers=1)
    spec = layer_spec(chosen)
    further = get_gpt_mtp_block_spec(chosen, spec, use_transformer_engine=False)
    model = GPTModel(chosen, spec, vocab_size=VOCABULARY, max_sequence_length=LENGTH, mtp_block_spec=further)
    loss_of(model, batch(0)).mean().backward()
    return metrics(), [bool(p.grad.any()) for name, p in model.named_parameters() if "router" in name]


def half_precision(spec):
    """Norms of gradients in float16, under Megatron's loss scale, which balance losses must share."""
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
    from megatron.core.transformer.module import Float16Module

    half = {"fp16": True, "params_dtype": torch.float16, "moe_aux_loss_coeff": 1.0}
    model = gpt(GATED | BALANCED | half, spec)
    fill(model)
    model.config.finalize_model_grads_func = finalize_model_grads
    options = DistributedDataParallelConfig(grad_reduce_in_fp32=True)
    model = DistributedDataParallel(model.config, options, Float16Module(model.config, model))
    scaled = {"fp16": True, "params_dtype": torch.float16, "initial_loss_scale": 1024.0, "clip_grad": 1e9}
    optimizer = get_megatron_optimizer(OptimizerConfig(optimizer="sgd", lr=0.1, **scaled), [model])
    model.config.grad_scale_func = optimizer.scale_loss
    norms = []
    for _ in range(2):
        model.zero_grad_buffer()
        optimizer.zero_grad()
        forward_backward(model, 1)
        norms.append(float(optimizer.step()[1]))
    return norms


def padded(spec):
    """Losses, and what routers learn from them, where half of a batch is padding."""
    from megatron.core import parallel_state

    split = parallel_state.get_tensor_model_parallel_world_size() > 1
    model = gpt(GATED | BALANCED | {"moe_z_loss_coeff": None, "sequence_parallel": split}, spec)
    fill(model)
    given, mask = batch(0), torch.zeros(4, LENGTH, dtype=torch.bool)
    mask[0, 9:] = mask[2, 3:] = True
    positions = torch.arange(LENGTH).expand_as(mask)
    losses = model(given["tokens"], positions, None, labels=given["labels"], padding_mask=mask)
    losses.mean().backward()
    return [losses.detach(), *(p.grad.clone() for name, p in model.named_parameters() if "router" in name)]


def overlapped(overlap):
    """Norms of the reduced gradients where their reduction begins in backward, or after it."""
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads

    model = gpt(GATED, layer_spec)
    fill(model)
    model.config.finalize_model_grads_func = finalize_model_grads
    options = DistributedDataParallelConfig(overlap_grad_reduce=overlap, bucket_size=1000)
    model = DistributedDataParallel(model.config, options, model)
    if overlap:
        model.config.no_sync_func, model.config.grad_sync_func = model.no_sync, model.start_grad_sync
    forward_backward(model, 2)
    return [float(parameter.main_grad.norm()) for parameter in model.parameters()]


def tied():
    """Losses of two models with one matrix for embedding and output, after `same_values`."""
    from megatron.core.models.gpt import GPTModel

    from fastmoe.integrations.megatron import same_values

    models = []
    for spec in (own_spec, layer_spec):
        chosen = config(**GATED)
        sizes = {"vocab_size": VOCABULARY, "max_sequence_length": LENGTH}
        models.append(GPTModel(chosen, spec(chosen), share_embeddings_and_output_weights=True, **sizes))
    same_values(*models)
    return [loss_of(model, batch(0)).detach() for model in models]


def one_router_for_all():
    """Whether layers share the modules that one spec gives them."""
    import fastmoe
    from fastmoe.integrations.megatron import gpt_layer_spec

    router = fastmoe.routers.TopKRouter(32, 4, 2)
    expert = torch.nn.Linear(32, 32)
    model = gpt(None, lambda chosen: gpt_layer_spec(4, layer_spec=own_spec(chosen), router=router, expert=expert))
    layers = list(fastmoe.model.moe_layers(model).values())
    parameters = [id(parameter) for layer in layers for parameter in layer.parameters()]
    return len(layers), len(parameters) == len(set(parameters))


def keys_one_by_one(overrides):
    """What a checkpoint holds where every expert has a key of its own: of Megatron's layer, and of fastmoe's."""
    from megatron.core.dist_checkpointing.mapping import apply_factories

    from fastmoe.integrations.megatron import same_values

    models = [gpt(GATED | overrides, spec) for spec in (own_spec, layer_spec)]
    same_values(*models)
    found = []
    for model in models:
        state = model.sharded_state_dict(metadata={"singleton_local_shards": True})
        apply_factories(state)
        found.append({tensor.key: tensor.data.detach() for tensor in sharded(state) if "mlp" in tensor.key})
    return found


def repeated_multi_token_prediction():
    """Metrics of one layer that predicts two tokens ahead in turn, by Megatron's layer and by fastmoe's."""
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_mtp_block_spec

    from fastmoe.integrations.megatron import same_values

    found, models = [], []
    for make in (own_spec, layer_spec):
        chosen = config(**GATED, **BALANCED, mtp_num_layers=2, mtp_use_repeated_layer=True)
        spec = make(chosen)
        further = get_gpt_mtp_block_spec(chosen, spec, use_transformer_engine=False)
        sizes = {"vocab_size": VOCABULARY, "max_sequence_length": LENGTH}
        models.append(GPTModel(chosen, spec, mtp_block_spec=further, **sizes))
    same_values(*models)
    for model in models:
        loss_of(model, batch(0)).mean().backward()
        found.append(metrics())
    return found


def converted_with_multi_token_prediction():
    """Metrics of a dense model of two layers and one for multi-token prediction, after `moefy`."""
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec, get_gpt_mtp_block_spec

    import fastmoe

    chosen = config(**GATED, **BALANCED, mtp_num_layers=1)
    spec = get_gpt_layer_local_spec()
    further = get_gpt_mtp_block_spec(chosen, spec, use_transformer_engine=False)
    model = GPTModel(chosen, spec, vocab_size=VOCABULARY, max_sequence_length=LENGTH, mtp_block_spec=further)
    loss_of(fastmoe.moefy(model, num_experts=4), batch(0)).mean().backward()
    return metrics()


def scaled_losses(scale):
    """Gradients of the routers where balance losses are multiplied by `scale`, and are all that there is."""
    import fastmoe

    model = gpt(GATED | BALANCED, layer_spec)
    fill(model)
    fastmoe.set_aux_loss_scale(model, scale)
    (loss_of(model, batch(0)).mean() * 0).backward()
    return [parameter.grad.clone() for name, parameter in model.named_parameters() if "router" in name]
