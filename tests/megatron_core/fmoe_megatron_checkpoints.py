"""What tests of checkpoints of `fmoe.megatron` do where Megatron-Core runs."""

import os

from fmoe_megatron_cases import bare, error_of, fmoefied, wrapped
from megatron_models import dense
from megatron_training import forward_backward, optimizer_of
from megatron_values import pieces


def continued(folder, steps, *, load=False, save_after=None, optimizer=None, random=False):
    """Train, on from the last checkpoint if `load`, and save after so many of the steps.

    The iteration, losses, learning rate and values at the end.
    """
    from fmoe.megatron import load_checkpoint, save_checkpoint

    given = dict(optimizer or {})
    model = wrapped(bf16=given.pop("bf16", False), **({"balance_strategy": "noisy"} if random else {}))
    optimizer = optimizer_of(model, min_lr=1e-4, **given)
    scheduler = scheduler_of(optimizer)
    iteration = load_checkpoint(model, optimizer, scheduler, folder) if load else 0
    losses = []
    for step in range(steps + 1):
        if step == save_after:
            save_checkpoint(iteration + step, model, optimizer, scheduler, folder)
        if step < steps:
            losses += forward_backward(model, 1)
            optimizer.step()
            scheduler.step(1)
            model.zero_grad_buffer()
            optimizer.zero_grad()
    return iteration + steps, losses, optimizer.param_groups[0]["lr"], pieces(bare(model))


def scheduler_of(optimizer):
    from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

    return OptimizerParamScheduler(
        optimizer, init_lr=0.0, max_lr=1e-2, min_lr=1e-4, lr_warmup_steps=2, lr_decay_steps=10, lr_decay_style="linear",
        start_wd=0.1, end_wd=0.1, wd_incr_steps=10, wd_incr_style="constant",
    )  # fmt: skip


def rates_after_loading(folder):
    """By group, whether it is of experts, and the learning rate that it had when it was saved, without a scheduler."""
    from fmoe.megatron import load_checkpoint, save_checkpoint

    model = wrapped()
    optimizer = optimizer_of(model)
    forward_backward(model, 1)
    optimizer.step()
    for group in optimizer.param_groups:
        group["lr"] = 0.5 if group["is_expert_parallel"] else 0.25
    save_checkpoint(1, model, optimizer, None, folder)
    optimizer = optimizer_of(model)
    load_checkpoint(model, optimizer, None, folder)
    return [(group["is_expert_parallel"], group["lr"]) for group in optimizer.param_groups]


def killed_while_saving(folder):
    """A process that dies before its second checkpoint has its name."""
    from fmoe.megatron import checkpoint

    checkpoint.write_document = lambda *_: os._exit(3)
    continued(folder, 1, load=True, save_after=1)


def checkpoint_errors(folder):
    from fmoe.megatron import load_checkpoint, save_checkpoint

    model = wrapped()
    other = fmoefied(dense({"num_layers": 1}))
    optimizer = optimizer_of(model)
    adam_less = folder / "without"
    forward_backward(model, 1)
    optimizer.step()
    save_checkpoint(1, model, None, None, adam_less)
    spread = wrapped(distributed=True)
    spread_optimizer = optimizer_of(spread, use_distributed_optimizer=True)
    forward_backward(spread, 1)
    spread_optimizer.step()
    (folder / "odd").mkdir()
    (folder / "odd" / "latest_checkpointed_iteration.txt").write_text("release")
    return {
        "empty": load_checkpoint(model, None, None, folder / "nothing"),
        "other": error_of(lambda: load_checkpoint(other, None, None, adam_less)),
        "optimizer": error_of(lambda: load_checkpoint(model, optimizer, None, adam_less)),
        "zero": error_of(lambda: save_checkpoint(0, model, None, None, folder)),
        "pieces": error_of(lambda: save_checkpoint(1, [model, model], None, None, folder)),
        "distributed": error_of(lambda: save_checkpoint(1, spread, spread_optimizer, None, folder / "spread")),
        "odd": error_of(lambda: load_checkpoint(model, None, None, folder / "odd")),
        "list": load_checkpoint([model], None, None, adam_less),
    }
