"""A tiny model trained by Megatron-Core: its schedules, DistributedDataParallel, optimizer, checkpoints."""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron_models import LENGTH, batch, gpt, loss_of
from megatron_processes import run
from megatron_values import fill, gradients, pieces, whole

SEQUENCES = 4


@dataclass
class Trained:
    """Of each step, the loss over all tokens and the norm of all gradients; by name, gradients and final values."""

    losses: list[float]
    norms: list[float]
    gradients: dict[str, torch.Tensor]  # of the first step; none with a distributed optimizer
    values: dict[str, torch.Tensor]


def trained(version, world, *, tp=1, pp=1, ep=1, etp=None, **options):
    """What `train(**options)` came to, in this layout."""
    answers = run(version, world, train, tp=tp, pp=pp, ep=ep, etp=etp, **options)
    losses = next((losses for losses, *_ in answers if losses), [])
    norms = answers[0][1]
    assert all(one[1] == norms for one in answers)
    return Trained(losses, norms, whole(one[2] for one in answers), whole(one[3] for one in answers))


def train(
    make=gpt,
    overrides=None,
    spec=None,
    convert=None,
    *,
    steps=3,
    micro_batches=1,
    load=None,
    load_optimizer=True,
    save=None,
    **optimizer_options,
):
    """Train `make(overrides, spec)`, or what `convert` makes of it, and return what `trained` puts together.

    Its first values are the same in any layout; so is the batch, of every step. `load`, `save`: folders of checkpoints.
    """
    model = make(overrides, spec)
    if convert:
        model = convert(model)
    fill(model)
    spread = optimizer_options.get("use_distributed_optimizer", False)  # then no process holds whole gradients
    model = parallel(model, spread)
    optimizer = optimizer_of(model, **optimizer_options)
    if load:
        load_checkpoint(load, model, optimizer if load_optimizer else None)
    losses, norms, first = [], [], []
    for _ in range(steps):
        losses += forward_backward(model, micro_batches)
        if not first and not spread:
            first = gradients(model.module)
        _, norm, _ = optimizer.step()
        norms.append(float(norm))
        model.zero_grad_buffer()
        optimizer.zero_grad()
    if save:
        save_checkpoint(save, model, optimizer)
    return losses, norms, first, pieces(model.module)


def parallel(model, distributed_optimizer=False):
    """In Megatron's DistributedDataParallel, and in its Float16Module before, as its training does."""
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
    from megatron.core.transformer.module import Float16Module

    if model.config.bf16:
        model = Float16Module(model.config, model)
    options = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True, use_distributed_optimizer=distributed_optimizer, overlap_grad_reduce=False
    )
    model.config.finalize_model_grads_func = finalize_model_grads
    return DistributedDataParallel(model.config, options, model)


def optimizer_of(model, **options):
    """Adam, in float32 at least, without weight decay and clipping unless told otherwise."""
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

    precision = {"bf16": model.config.bf16, "params_dtype": model.config.params_dtype}
    options = {"optimizer": "adam", "lr": 1e-2, "weight_decay": 0.0, "clip_grad": 1e9, **precision, **options}
    return get_megatron_optimizer(OptimizerConfig(**options), [model])


def forward_backward(model, micro_batches):
    """Megatron's schedule for this layout. In a list, the loss of the whole batch; nothing before the last stage."""
    from megatron.core import parallel_state
    from megatron.core.pipeline_parallel import get_forward_backward_func

    given = [batch(number, SEQUENCES) for number in range(micro_batches)]
    reported = get_forward_backward_func()(
        forward_step_func=_forward_step,
        data_iterator=iter(given),
        model=[model],
        num_microbatches=micro_batches,
        seq_length=LENGTH,
        micro_batch_size=len(given[0]["tokens"]),
        forward_only=False,
    )
    if not reported:
        return []
    loss = torch.stack([one["loss"] for one in reported]).double().mean()
    dist.all_reduce(loss, group=parallel_state.get_data_parallel_group())
    return [loss.item() / parallel_state.get_data_parallel_world_size()]


def _forward_step(given, model):
    def mean(loss_of_tokens):
        loss = loss_of_tokens.float().mean()
        return loss, {"loss": loss.detach().clone()}  # the schedule divides it in place

    return loss_of(model, next(given)), mean


def save_checkpoint(folder, model, optimizer):
    from megatron.core import dist_checkpointing

    dist_checkpointing.save(_state(model, optimizer, loading=False), str(folder))


def load_checkpoint(folder, model, optimizer=None):
    """The model's values and, where one is given, the optimizer's: from another layout, for Megatron's own optimizers,
    only where both have expert parallelism or neither.
    """
    from megatron.core import dist_checkpointing

    state = dist_checkpointing.load(_state(model, optimizer, loading=True), str(folder))
    model.module.load_state_dict(state["model"])
    if optimizer:
        optimizer.load_state_dict(state["optimizer"])


def _state(model, optimizer, loading):
    values = model.module.sharded_state_dict()
    if not optimizer:
        return {"model": values}
    how = {"distrib_optim_sharding_type": "fully_reshardable"}  # the distributed optimizer's way that is not deprecated
    return {"model": values, "optimizer": optimizer.sharded_state_dict(values, is_loading=loading, metadata=how)}
