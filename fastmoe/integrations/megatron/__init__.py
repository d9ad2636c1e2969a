"""Megatron-Core (extra `fastmoe[megatron]`): fastmoe's experts in its MoE layer, fastmoe's layer in its models, or a
built model turned into an MoE. docs/megatron.md
"""

from fastmoe.integrations.megatron.convert import moefy
from fastmoe.integrations.megatron.experts import FastMoEExperts
from fastmoe.integrations.megatron.layer import FastMoELayer
from fastmoe.integrations.megatron.spec import gpt_layer_spec
from fastmoe.integrations.megatron.values import same_values

__all__ = ["FastMoEExperts", "FastMoELayer", "gpt_layer_spec", "moefy", "same_values"]
