"""Whole layers of other libraries, router included, beside ours.

Their routers, capacities and initial weights are their own: they are checked for shape and finite numbers alone. Those
that need a GPU follow their projects' documentation.
"""

import importlib
import importlib.util
import os
from collections.abc import Callable

import torch
from torch import Tensor, nn

from fastmoe.bench.problem import Contender, Problem, RefusedError
from fastmoe.layer import MoE

_MOST_DISPATCH_BYTES = 2 << 30


def our_layer(p: Problem) -> Contender:
    """`fastmoe.MoE`, router included: what the other layers are compared with."""
    _, E, D, H, K = p.shape
    layer = MoE(D, E, K, d_hidden=H, activation=p.activation, bias=False, device=p.device, dtype=p.dtype)
    return _whole(p, layer, layer)


def deepspeed(p: Problem) -> Contender:
    """DeepSpeed's MoE in one process, nothing dropped."""
    _check(p, "deepspeed", most_k=2)
    _, E, D, _, K = p.shape
    if p.device == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    module = importlib.import_module("deepspeed.moe.layer")
    comm = importlib.import_module("deepspeed.comm")
    if not comm.is_initialized():
        os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT="29517")
        comm.init_distributed("gloo" if p.device == "cpu" else "nccl")
    layer = module.MoE(D, _mlp(p), num_experts=E, ep_size=1, k=K, drop_tokens=False, use_rts=False)
    layer.set_deepspeed_parallelism()
    layer = layer.to(p.device, p.dtype)
    return _whole(p, layer, lambda x_TD: layer(x_TD.unsqueeze(0))[0].squeeze(0))


def st_moe(p: Problem) -> Contender:
    """st-moe-pytorch: one-hot dispatch with a capacity, GEGLU experts."""
    _check(p, "st_moe_pytorch", most_k=9)
    _, E, D, H, K = p.shape
    module = importlib.import_module("st_moe_pytorch")
    layer = module.MoE(dim=D, num_experts=E, gating_top_n=K, expert_hidden_mult=H / D).to(p.device, p.dtype)
    return _whole(p, layer, lambda x_TD: layer(x_TD.unsqueeze(0))[0].squeeze(0))


def mixture_of_experts(p: Problem) -> Contender:
    """mixture-of-experts (PyPI): top-2 with a capacity, one-hot dispatch."""
    _check(p, "mixture_of_experts", most_k=2)
    if p.shape[4] != 2:
        raise RefusedError("it chooses 2 experts")
    _, E, D, H, _ = p.shape
    module = importlib.import_module("mixture_of_experts")
    layer = module.MoE(dim=D, num_experts=E, hidden_dim=H, activation=nn.GELU).to(p.device, p.dtype)
    return _whole(p, layer, lambda x_TD: layer(x_TD.unsqueeze(0))[0].squeeze(0))


def scattermoe(p: Problem) -> Contender:
    _check(p, "scattermoe", gpu=True)
    _, E, D, H, K = p.shape
    module = importlib.import_module("scattermoe.mlp")
    layer = module.MLP(input_size=D, hidden_size=H, activation=nn.GELU(), num_experts=E, top_k=K).to(p.device, p.dtype)
    return _whole(p, layer, lambda x_TD: layer(x_TD, p.weights_TK.to(p.dtype), p.ids_TK))


def megablocks(p: Problem) -> Contender:
    _check(p, "megablocks", gpu=True)
    _, E, D, H, K = p.shape
    arguments = importlib.import_module("megablocks.layers.arguments")
    module = importlib.import_module("megablocks.layers.dmoe")
    options = arguments.Arguments(
        hidden_size=D, ffn_hidden_size=H, moe_num_experts=E, moe_top_k=K, bias=False, return_bias=False, bf16=True
    )
    layer = module.dMoE(options).to(p.device, p.dtype)
    return _whole(p, layer, lambda x_TD: _first(layer(x_TD.unsqueeze(0))).squeeze(0))


def sonicmoe(p: Problem) -> Contender:
    _check(p, "sonicmoe", gpu=True)
    _, E, D, H, K = p.shape
    module = importlib.import_module("sonicmoe")
    kind = module.enums.ActivationType.SWIGLU if p.gated else module.enums.ActivationType.GELU
    layer = module.MoE(
        num_experts=E, num_experts_per_tok=K, hidden_size=D, intermediate_size=H, activation_function=kind,
        add_bias=False, std=0.02,
    )  # fmt: skip
    layer = layer.to(p.device, p.dtype)
    return _whole(p, layer, lambda x_TD: _first(layer(x_TD)))


def tutel(p: Problem) -> Contender:
    _check(p, "tutel")
    _, E, D, H, K = p.shape
    module = importlib.import_module("tutel.moe")
    layer = module.moe_layer(
        gate_type={"type": "top", "k": K, "capacity_factor": 0}, model_dim=D,
        experts={"type": "ffn", "num_experts_per_device": E, "hidden_size_per_expert": H},
    )  # fmt: skip
    layer = layer.to(p.device, p.dtype)
    return _whole(p, layer, lambda x_TD: layer(x_TD.unsqueeze(0)).squeeze(0))


LAYERS: dict[str, Callable[[Problem], Contender]] = {
    "fastmoe layer": our_layer,
    "DeepSpeed MoE": deepspeed,
    "st-moe-pytorch": st_moe,
    "mixture-of-experts": mixture_of_experts,
    "ScatterMoE": scattermoe,
    "MegaBlocks": megablocks,
    "SonicMoE": sonicmoe,
    "Tutel": tutel,
}


def _check(p: Problem, package: str, gpu: bool = False, most_k: int | None = None) -> None:
    if importlib.util.find_spec(package) is None:
        raise RefusedError(f"not installed: {package}")
    if gpu and p.device == "cpu":
        raise RefusedError("it needs a GPU")
    T, E, _, _, K = p.shape
    if most_k is not None:  # dispatch by one-hot tensors (T, E, capacity)
        if most_k < K:
            raise RefusedError(f"it chooses at most {most_k} experts")
        size = T * E * max(4, 2 * T * K // E) * 4
        if size > _MOST_DISPATCH_BYTES:
            raise RefusedError(f"its one-hot dispatch tensor would take {size / 2**30:.0f} GiB")


def _whole(p: Problem, layer: nn.Module, call: Callable[[Tensor], Tensor]) -> Contender:
    return Contender(lambda: call(p.x_TD), [p.x_TD, *layer.parameters()], p.grad_TD, None)


def _mlp(p: Problem) -> nn.Module:
    _, _, D, H, _ = p.shape
    if p.activation not in ("gelu", "relu"):
        raise RefusedError(f"its experts here are plain, not {p.activation}")
    activation = nn.GELU() if p.activation == "gelu" else nn.ReLU()
    return nn.Sequential(nn.Linear(D, H, bias=False), activation, nn.Linear(H, D, bias=False))


def _first(output: Tensor | tuple) -> Tensor:
    return output if isinstance(output, torch.Tensor) else output[0]
