"""FastMoE's gates; each has a file of its own, as there."""

from fmoe.gates.base_gate import BaseGate
from fmoe.gates.dc_gate import DCGate
from fmoe.gates.faster_gate import FasterGate, gen_faster_gate
from fmoe.gates.gshard_gate import GShardGate
from fmoe.gates.naive_gate import NaiveGate
from fmoe.gates.noisy_gate import NoisyGate
from fmoe.gates.swipe_gate import SwipeGate
from fmoe.gates.switch_gate import SwitchGate
from fmoe.gates.zero_gate import ZeroGate

__all__ = [
    "BaseGate",
    "DCGate",
    "FasterGate",
    "GShardGate",
    "NaiveGate",
    "NoisyGate",
    "SwipeGate",
    "SwitchGate",
    "ZeroGate",
    "gen_faster_gate",
]
