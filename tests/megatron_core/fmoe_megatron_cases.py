"""What tests of `fmoe.megatron` do where Megatron-Core runs."""

import functools
import importlib
import os

import torch
from megatron_models import batch, dense, gpt, loss_of
from megatron_training import forward_backward, optimizer_of
from megatron_values import fill, pieces
from model_cases import dense_spec
from torch import nn


def own_gate(d_model, num_expert, world_size, top_k):
    """A gate of one's own, which goes by all workers' tokens in both ways that FastMoE has."""
    from fmoe.gates import BaseGate
    from fmoe.gates.utils import limit_by_capacity

    class Own(BaseGate):
        def __init__(self):
            super().__init__(num_expert, world_size)
            self.scores = nn.Linear(d_model, self.tot_expert)

        def forward(self, x):
            weights_TK, ids_TK = self.scores(x).sigmoid().topk(top_k)
            *_, ids_TK = limit_by_capacity(ids_TK, num_expert, world_size, 1000)
            self.set_loss(self.sharers().sum_for_loss(weights_TK.square().sum()) / 64)
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


def gate_gradients(weight):
    """Of each layer's gate, where its loss has this weight."""
    torch.manual_seed(1)
    model = wrapped(gate=own_gate, balance_loss_weight=weight)
    forward_backward(model, 1)
    return [layer.mlp.gate.scores.weight.main_grad for layer in model.module.decoder.layers]


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


def run_blocks(blocks, folder):
    """One after another; what `iteration` is then."""
    os.chdir(folder)
    names = {}
    for block in blocks:
        exec(compile(block, "block", "exec"), names)
    return names["iteration"]
