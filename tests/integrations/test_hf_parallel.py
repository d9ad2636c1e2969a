"""Converted models of transformers under `fastmoe.parallelize`, on two processes, and their way back to one."""

import copy
import os

import processes
import pytest
import torch
import torch.distributed as dist
from dense_models import inputs, make
from processes import needs_gloo
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments

import fastmoe
from fastmoe.parallel.consolidate_command import consolidate

pytestmark = needs_gloo
E = 4


def whole(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def grads_of_two(name, engine, folder):
    """The largest difference of any gradient from one process's with the batches of both, relative to the largest."""
    torch.manual_seed(0)
    model = fastmoe.moefy(make(name), E, router_options={"aux_loss_weight": 0.1}).train()
    batch = inputs(name, labels=True, batch=4)
    reference = copy.deepcopy(model)
    fastmoe.set_stats_group(reference, [dist.new_group([rank]) for rank in range(2)][dist.get_rank()])
    (reference(**batch).loss * 0.5).backward()
    fastmoe.parallelize(model, init_device_mesh("cpu", (1, 2), mesh_dim_names=("dp", "ep")), engine=engine)
    here = slice(2 * dist.get_rank(), 2 * dist.get_rank() + 2)
    (model(**{key: value[here] for key, value in batch.items()}).loss * 0.5).backward()
    errors = []
    held = slice(2 * dist.get_rank(), 2 * dist.get_rank() + 2)
    for (key, parameter), expected in zip(model.named_parameters(), reference.parameters(), strict=True):
        wanted, grad = expected.grad, whole(parameter.grad)
        if "experts" in key and grad.shape != wanted.shape:
            wanted = wanted[held]
        errors.append(((grad - wanted).abs().max() / wanted.abs().max().clamp(min=1e-3)).item())
    try:
        model.save_pretrained(folder)
    except ValueError as error:
        message = str(error)
    fastmoe.save(model, None, f"{folder}/checkpoint")
    return max(errors), message


@pytest.mark.parametrize("engine", ["ddp", "fsdp"])
def test_experts_of_a_converted_model_on_two_processes(engine, tmp_path):
    for error, message in processes.run(2, grads_of_two, "llama", engine, str(tmp_path)):
        assert error < 1e-4
        assert "spread over 2 processes: use fastmoe.save" in message
    torch.manual_seed(0)
    model = fastmoe.moefy(make("llama"), E)
    model.save_pretrained(tmp_path / "one", state_dict={})
    consolidate(tmp_path / "checkpoint", tmp_path / "one" / "model.safetensors")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "one")
    for (name, parameter), other in zip(model.named_parameters(), loaded.parameters(), strict=True):
        assert torch.equal(parameter, other), name


class Grads(TrainerCallback):
    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.found = {name.removeprefix("module."): p.grad.clone() for name, p in model.named_parameters()}


def grads_of_trainer(folder, options):
    """Gradients of one step of Trainer over the same eight texts, however many processes share them."""
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    if world > 1:
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world))
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="29500")  # the group is there already
        options = {**options, "ddp_backend": "gloo"}
    torch.manual_seed(0)
    model = fastmoe.moefy(make("llama"), E, router_options={"aux_loss_weight": 1.0})
    ids = torch.randint(5, 90, (8, 6))
    rows = [{"input_ids": row, "labels": torch.where(torch.arange(6) < 3, -100, row)} for row in ids]
    arguments = TrainingArguments(
        output_dir=folder, per_device_train_batch_size=4 // world, gradient_accumulation_steps=2, max_steps=1,
        learning_rate=0.0, max_grad_norm=0.0, report_to=[], use_cpu=True, save_strategy="no", disable_tqdm=True,
        **options,
    )  # fmt: skip
    seen = Grads()
    Trainer(model=model, args=arguments, train_dataset=rows, callbacks=[seen]).train()
    return seen.found


@pytest.mark.parametrize("options", [{}, {"label_smoothing_factor": 0.1}], ids=["plain", "label_smoothing"])
def test_balance_losses_of_trainer_on_two_processes(options, tmp_path):
    alone = grads_of_trainer(str(tmp_path), options)
    for found in processes.run(2, grads_of_trainer, str(tmp_path), options):
        for name, grad in alone.items():
            if "router" in name:
                assert (found[name] - grad).abs().max() < 0.05 * grad.abs().max(), name
