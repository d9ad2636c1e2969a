"""Experts: rows grouped by expert in, rows out. They know nothing of routing."""

from fastmoe.experts.base import Experts, local
from fastmoe.experts.dense import DenseExperts, DenseModules
from fastmoe.experts.mlp import ActivationLike, MLPExperts, check_activation, check_dropout, is_gated
from fastmoe.experts.modules import ExpertLike, ModuleExperts, build_experts, build_modules
from fastmoe.experts.reset import reset_where_possible
from fastmoe.experts.shared import SharedExpert

__all__ = [
    "ActivationLike",
    "DenseExperts",
    "DenseModules",
    "ExpertLike",
    "Experts",
    "MLPExperts",
    "ModuleExperts",
    "SharedExpert",
    "build_experts",
    "build_modules",
    "check_activation",
    "check_dropout",
    "is_gated",
    "local",
    "reset_where_possible",
]
