"""FastMoE's face for Megatron, over Megatron-Core: `fmoefy` for built models, its layer, wrapper and checkpoints.

docs/migrating-from-fastmoe.md says what differs from FastMoE 1.1.0, which patched Megatron-LM 2 and 3.
"""

from typing import Any

from fmoe.megatron.balance import add_balance_log, get_balance_profile
from fmoe.megatron.checkpoint import load_checkpoint, save_checkpoint
from fmoe.megatron.distributed import DistributedDataParallel
from fmoe.megatron.layers import MegatronMLP, fmoefy

__all__ = [
    "DistributedDataParallel",
    "MegatronMLP",
    "add_balance_log",
    "fmoefy",
    "get_balance_profile",
    "load_checkpoint",
    "save_checkpoint",
]

GONE = {
    "add_fmoe_args": "Megatron-Core has no global arguments: give fmoefy its own",
    "generate_megatron_gate_hook": "layers keep their loads: get_balance_profile(model)",
    "patch_forward_step": "balance losses are attached by themselves: leave it out",
    "patch_model_provider": "call fmoefy(model, ...) in the model provider",
    "reset_gate_hook": "layers keep their loads: leave it out",
}


def __getattr__(name: str) -> Any:
    if name in GONE:
        raise ImportError(f"fmoe.megatron has no {name} any more. {GONE[name]}; see docs/migrating-from-fastmoe.md")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
