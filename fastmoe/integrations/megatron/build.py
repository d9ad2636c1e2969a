"""An `fastmoe.MoE` with the experts of this process, started and marked as Megatron does its own layers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from fastmoe._seeds import mix
from fastmoe.dispatch import AllToAllDispatcher, Spread
from fastmoe.experts import MLPExperts, ModuleExperts
from fastmoe.integrations.megatron.groups import Groups
from fastmoe.integrations.megatron.routing import made_by_name
from fastmoe.layer import MoE
from fastmoe.parallel import materialize
from fastmoe.parallel.hidden import check_hidden, split_dimension, split_hidden, take_hidden
from fastmoe.parallel.shard import expert_parameters, keep_stacked
from fastmoe.routers.base import RouterLinear

if TYPE_CHECKING:
    from megatron.core.transformer.transformer_config import TransformerConfig


def build_moe(config: TransformerConfig, groups: Groups, num_experts: int, top_k: int, options: dict[str, Any]) -> MoE:
    """The layer, whose experts start with values that depend on their global number and no layout.

    Built-in experts and routers never exist on this process but in part; those of one's own are made whole first.

    Raises:
        ValueError: experts that cannot be spread in this way.
    """
    seed = int(torch.randint(2**62, ()))
    in_part = options.get("expert") is None and made_by_name(options["router"])
    device = place_of(config)
    with torch.random.fork_rng(_cuda(device)):
        torch.manual_seed(seed)
        where = "meta" if in_part else device
        moe = MoE(config.hidden_size, num_experts, top_k, **options, device=where, dtype=config.params_dtype)
        spread_experts(moe, groups)
        if config.add_bias_linear and isinstance(proj := getattr(moe.router, "proj", None), RouterLinear):
            proj.bias = nn.Parameter(torch.zeros_like(proj.weight[:, 0]))  # as Megatron's router has one then
        if in_part and device != "meta":
            materialize(moe, device, seed=seed)
        if config.perform_initialization and device != "meta":
            _start_router(moe, config)
            if isinstance(moe.experts, MLPExperts):
                start_experts(moe.experts, config, seed)
    mark_parameters(moe, groups, config)
    return moe


def place_of(config: TransformerConfig) -> Any:
    """Where Megatron puts new parameters."""
    if getattr(config, "init_model_with_meta_device", False):
        return "meta"
    return "cpu" if config.use_cpu_initialization else torch.cuda.current_device()


def spread_experts(moe: MoE, groups: Groups) -> None:
    """Leave the layer the experts, or parts of experts, of this process."""
    experts = moe.experts
    if groups.expert_tp.size > 1:
        check_hidden(experts, groups.expert_tp.size)
        split_hidden(experts, groups.expert_tp)
    if groups.ep.size == 1:
        return
    check_divides(moe.num_experts, groups)
    spread = Spread(moe.num_experts, groups.ep)
    if isinstance(experts, ModuleExperts):
        experts.check_spread([spread.held_by(rank) for rank in range(groups.ep.size)])
        experts.keep(spread.held)
    else:
        keep_stacked(experts, spread)
    stacked = isinstance(experts, MLPExperts)
    moe.dispatcher = AllToAllDispatcher(spread, backend=moe.backend, uniform=stacked, sum_gradients=True)


def check_divides(num_experts: int, groups: Groups) -> None:
    """Raises:
    ValueError: processes would hold different numbers of experts, which Megatron's checkpoints do not know.
    """
    if num_experts % groups.ep.size:
        raise ValueError(
            f"num_experts must be a multiple of expert_model_parallel_size={groups.ep.size}, got {num_experts}"
        )


@torch.no_grad()
def start_experts(experts: MLPExperts, config: TransformerConfig, seed: int) -> None:
    """Give the experts here the first values that Megatron's configuration asks for."""
    methods = {"w1": config.init_method, "w2": config.output_layer_init_method}
    for name, stacked in experts.named_parameters(recurse=False):
        if name not in methods:
            stacked.zero_()
            continue
        dim = split_dimension(name)
        shape = [size * (experts.tp.size if d == dim else 1) for d, size in enumerate(stacked.shape)][1:]
        with torch.random.fork_rng(_cuda(stacked.device)):
            for row, number in zip(stacked, experts.held, strict=True):
                torch.manual_seed(mix(seed, name, number))
                whole = torch.empty(shape, dtype=stacked.dtype, device=stacked.device)
                methods[name](whole)
                row.copy_(take_hidden(experts, name, whole.unsqueeze(0))[0])


@torch.no_grad()
def _start_router(moe: MoE, config: TransformerConfig) -> None:
    proj = getattr(moe.router, "proj", None)
    if isinstance(proj, RouterLinear) and not getattr(moe.router, "own_init", True):
        for parameter in proj.parameters():
            config.init_method(parameter)


def mark_parameters(moe: MoE, groups: Groups, config: TransformerConfig) -> None:
    """Tell Megatron's gradient reductions and norms which parameters are whose."""
    own = expert_parameters(moe)
    for name, parameter in own.items():
        split = not isinstance(moe.experts, MLPExperts) or split_dimension(name) is not None
        mark_expert(parameter, groups, split=split)
    for parameter in _others(moe, own.values()):
        parameter.sequence_parallel = config.sequence_parallel and not groups.whole_sequence  # type: ignore[attr-defined]


def mark_expert(parameter: nn.Parameter, groups: Groups, *, split: bool) -> None:
    """`split`: whether the expert tensor parallel group holds parts of it, not copies."""
    parameter.allreduce = not groups.experts_apart  # type: ignore[attr-defined]
    first = groups.expert_tp.rank == 0
    parameter.tensor_model_parallel = split or first  # type: ignore[attr-defined]  # of copies the norm counts one


def _others(moe: MoE, own: Any) -> Iterator[nn.Parameter]:
    known = {id(parameter) for parameter in own}
    return (parameter for parameter in moe.parameters() if id(parameter) not in known)


def _cuda(device: Any) -> list[Any]:
    """The devices whose random numbers are set aside besides the CPU's."""
    on_gpu = isinstance(device, int) or (isinstance(device, torch.device) and device.type == "cuda")
    return [device] if on_gpu else []
