"""Mixture-of-Experts for PyTorch, made ordinary."""

from fastmoe import kernels, routers
from fastmoe.hosts import moefy
from fastmoe.kernels import backends, empty_cache
from fastmoe.layer import MoE
from fastmoe.load_monitor import LoadMonitor
from fastmoe.mmoe import MMoE
from fastmoe.model import AuxLoss, AuxLosses, collect_aux_losses, moe_layers, set_aux_loss_scale, set_stats_group, stats
from fastmoe.monitor import LayerLoad, LayerStats, LoadSnapshot, TaskStats
from fastmoe.parallel import clip_grad_norm_, load, materialize, no_sync, parallelize, save
from fastmoe.parameters import Summary, summary
from fastmoe.routers import Router, Routing, register_router
from fastmoe.token_ids import feed_token_ids

__version__ = "0.1.0"

__all__ = [
    "AuxLoss",
    "AuxLosses",
    "LayerLoad",
    "LayerStats",
    "LoadMonitor",
    "LoadSnapshot",
    "MMoE",
    "MoE",
    "Router",
    "Routing",
    "Summary",
    "TaskStats",
    "backends",
    "clip_grad_norm_",
    "collect_aux_losses",
    "empty_cache",
    "feed_token_ids",
    "kernels",
    "load",
    "materialize",
    "moe_layers",
    "moefy",
    "no_sync",
    "parallelize",
    "register_router",
    "routers",
    "save",
    "set_aux_loss_scale",
    "set_stats_group",
    "stats",
    "summary",
]
