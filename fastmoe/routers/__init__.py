"""Routers: each decides which experts a token goes to, and with what weight."""

from fastmoe.routers.base import ROUTERS, Router, RouterLinear, get_router, register_router
from fastmoe.routers.losses import load_balance_loss, z_loss
from fastmoe.routers.routing import Routing, check_routing
from fastmoe.routers.topk import TopKRouter

__all__ = [
    "ROUTERS",
    "Router",
    "RouterLinear",
    "Routing",
    "TopKRouter",
    "check_routing",
    "get_router",
    "load_balance_loss",
    "register_router",
    "z_loss",
]
