"""What tests of `fmoe.megatron` do where Megatron-Core runs."""

import functools
import importlib

import torch
from megatron_models import batch, dense, gpt, loss_of
from megatron_training import forward_backward, optimizer_of
from megatron_values import fill, pieces
from model_cases import dense_spec
from torch import nn


def own_gate(d_model, num_expert, world_size, top_k):
    """A gate of one's own: FastMoE's documentation has such a class."""
    from fmoe.gates import BaseGate

    class Own(BaseGate):
        def __init__(self):
            super().__init__(num_expert, world_size)
            self.scores = nn.Linear(d_model, self.tot_expert)

        def forward(self, x):
            weights_TK, ids_TK = self.scores(x).sigmoid().topk(top_k)
            self.set_loss(weights_TK.square().mean())
            return ids_TK, weights_TK

    return Own()


def without_chance(name, d_model, num_expert, world_size, top_k):
    """A gate of FastMoE's that draws nothing and drops nothing, so that layouts can be compared."""
    from fmoe import gates

    options = {
        "GShardGate": {"random_routing": False, "capacity": (8, 8)},
        "SwitchGate": {"switch_eps": 0.0, "capacity": (8, 8)},
    }
    return getattr(gates, name)(d_model, num_expert, world_size, top_k, **options.get(name, {}))


GATES = {
    "naive": {},
    "own": {"gate": own_gate},
    "gshard": {"gate": functools.partial(without_chance, "GShardGate")},
    "switch": {"gate": functools.partial(without_chance, "SwitchGate"), "top_k": 1},
}


def fmoefied(model, **options):
    """4 experts in all, on any number of workers."""
    from megatron.core import parallel_state

    from fmoe.megatron import fmoefy

    each = 4 // parallel_state.get_expert_model_parallel_world_size()
    return fmoefy(model, **{"fmoe_num_experts": each, "hidden_hidden_size": 24} | options)


def wrapped(bf16=False, distributed=False, **options):
    from megatron.core.transformer.module import Float16Module

    from fmoe.megatron import DistributedDataParallel

    model = fmoefied(gpt({"bf16": True, "params_dtype": torch.bfloat16} if bf16 else None, dense_spec), **options)
    fill(model)
    if bf16:
        model = Float16Module(model.config, model)
    return DistributedDataParallel(
        model, accumulate_allreduce_grads_in_fp32=True, use_distributed_optimizer=distributed
    )


def bare(model):
    while hasattr(model, "module"):
        model = model.module
    return model


def losses_and_norms(case, steps=3):
    """Trained with FastMoE's own lines: fmoefy, DistributedDataParallel, Megatron's schedule."""
    model = wrapped(balance_loss_weight=0.5, **GATES[case])
    optimizer = optimizer_of(model)
    found = []
    for _ in range(steps):
        (loss,) = forward_backward(model, 1)
        _, norm, _ = optimizer.step()
        model.zero_grad_buffer()
        optimizer.zero_grad()
        found.append((loss, float(norm)))
    return found, pieces(model.module)


def layers_of(**options):
    """What is in the place of MLPs."""
    from fmoe.megatron import MegatronMLP

    model = fmoefied(dense(), **options)
    found = [layer for layer in model.modules() if isinstance(layer, MegatronMLP)]
    return [
        (type(layer.gate).__name__, layer.moe.num_experts, layer.moe.top_k, layer.moe.experts.w2.shape[2],
         layer.layer_number, layer.moe.router.aux_loss_weight)
        for layer in found
    ]  # fmt: skip


def in_a_spec():
    """As a layer of a spec, whose gate's parameters are trained."""
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer.spec_utils import ModuleSpec

    from fmoe.megatron import MegatronMLP

    spec = get_gpt_layer_local_spec(num_experts=4)
    spec.submodules.mlp = ModuleSpec(module=MegatronMLP, params={"gate": "NoisyGate"})
    model = gpt(None, lambda _: spec)
    loss_of(model, batch(0)).mean().backward()
    found = [layer for layer in model.modules() if isinstance(layer, MegatronMLP)]
    return [(layer.moe.num_experts, layer.layer_number, bool(layer.gate.w_gate.grad.any())) for layer in found]


def errors():
    """By case, the message, and whether the model is as it was."""
    from fmoe.megatron import fmoefy

    changes = {
        "version": {"megatron_version": "v2.5"},
        "strategy": {"balance_strategy": "gshared"},
        "gate": {"gate": "NiaveGate"},
        "both": {"gate": "NaiveGate", "balance_strategy": "naive"},
        "switch": {"balance_strategy": "switch"},
        "none": {"fmoe_num_experts": None},
        "zero": {"fmoe_num_experts": 0},
        "hidden": {"top_k": 5, "fmoe_num_experts": 8, "hidden_hidden_size": None},
        "weight": {"balance_loss_weight": -1.0},
    }
    found = {}
    for name, given in changes.items():
        model = dense()
        before = str(model), model.config.num_moe_experts
        message = error_of(lambda model=model, given=given: fmoefied(model, **given))
        found[name] = message, (str(model), model.config.num_moe_experts) == before
    model = wrapped()
    found["wrapped"] = error_of(lambda: fmoefy(model, 4)), True
    found["again"] = error_of(lambda: fmoefy(model.module, 4)), True
    found["gone"] = error_of(lambda: importlib.import_module("fmoe.megatron").patch_forward_step), True
    return found


def errors_of_workers():
    """Copies of all experts on two workers; and another number in the configuration than all workers'."""
    model = gpt(None, dense_spec)
    copies = error_of(lambda: fmoefied(model, distributed_experts=False))
    return copies, error_of(lambda: fmoefied(model, fmoe_num_experts=3))


def error_of(make):
    try:
        make()
    except (ValueError, ImportError) as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


class Answers(nn.Module):
    """A gate that always answers the same."""

    def __init__(self, *answer):
        super().__init__()
        self.answer = answer

    def forward(self, x):
        return self.answer


def wrong_answer():
    model = fmoefied(dense(), gate=lambda *_: Answers(torch.zeros(3), torch.zeros(3)))
    return error_of(lambda: loss_of(model, batch(0)))


class Writer:
    """Keeps what TensorBoard's would write."""

    def __init__(self):
        self.scalars = {}

    def add_scalar(self, name, value, iteration):
        self.scalars[name] = value, iteration


def balance():
    """Profiles before and after a pass, the loads, and what is written."""
    import torch.distributed as dist

    from fmoe.megatron import add_balance_log, get_balance_profile

    model = wrapped(balance_strategy="gshard")
    before = get_balance_profile(model)
    loss_of(model, batch(0)).mean().backward()
    writer = Writer() if dist.get_rank() == 0 else None
    add_balance_log(model, writer, 7)
    layers = [layer.mlp for layer in model.module.decoder.layers]
    loads = [layer.moe.last_stats.counts.tolist() for layer in layers]
    losses = [layer.gate.get_loss(clear=False).item() for layer in layers]
    return before, get_balance_profile(model), loads, losses, writer and writer.scalars


def reduced_by_hand():
    """Gradients of Megatron's schedule, and of a loop without it."""
    from megatron_values import gradients

    found = []
    for by_hand in (False, True):
        torch.manual_seed(1)
        model = wrapped()
        if by_hand:
            loss_of(model, batch(0)).mean().backward()
            model.allreduce_params()
        else:
            forward_backward(model, 1)
        found.append(gradients(model.module))
    return found


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


def killed_while_saving(folder):
    """A process that dies before its second checkpoint has its name."""
    import os

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
