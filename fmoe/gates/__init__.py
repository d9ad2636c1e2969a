"""FastMoE's gates; each has a file of its own, as there."""

from fmoe.gates.base_gate import BaseGate
from fmoe.gates.naive_gate import NaiveGate

__all__ = ["BaseGate", "NaiveGate"]
