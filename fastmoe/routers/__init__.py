"""Routers: each decides which experts a token goes to, and with what weight."""

from fastmoe.routers.base import ROUTERS, Router, RouterLinear, get_router, option_names, register_router
from fastmoe.routers.base_layer import BaseLayerRouter
from fastmoe.routers.context import RoutingContext
from fastmoe.routers.expert_choice import ExpertChoiceRouter
from fastmoe.routers.fixed import RandomRouter, RoundRobinRouter, ZeroRouter
from fastmoe.routers.gshard import GShardRouter
from fastmoe.routers.hashed import HashRouter
from fastmoe.routers.loss_free import LossFreeRouter
from fastmoe.routers.losses import cv_squared, load_balance_loss, sequence_balance_loss, z_loss
from fastmoe.routers.noisy_topk import NoisyTopKRouter
from fastmoe.routers.routing import Routing, SoftRouting, check_routing
from fastmoe.routers.sinkhorn import SinkhornRouter
from fastmoe.routers.soft import SoftRouter
from fastmoe.routers.swipe import SwipeRouter
from fastmoe.routers.switch import SwitchRouter
from fastmoe.routers.token_choice import TokenChoiceRouter
from fastmoe.routers.topk import TopKRouter

__all__ = [
    "ROUTERS",
    "BaseLayerRouter",
    "ExpertChoiceRouter",
    "GShardRouter",
    "HashRouter",
    "LossFreeRouter",
    "NoisyTopKRouter",
    "RandomRouter",
    "RoundRobinRouter",
    "Router",
    "RouterLinear",
    "Routing",
    "RoutingContext",
    "SinkhornRouter",
    "SoftRouter",
    "SoftRouting",
    "SwipeRouter",
    "SwitchRouter",
    "TokenChoiceRouter",
    "TopKRouter",
    "ZeroRouter",
    "check_routing",
    "cv_squared",
    "get_router",
    "load_balance_loss",
    "option_names",
    "register_router",
    "sequence_balance_loss",
    "z_loss",
]
