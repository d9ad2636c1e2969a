"""FastMoE's own API over fastmoe: scripts written for FastMoE 1.1.0 run as they are.

docs/migrating-from-fastmoe.md says what differs, and how each line reads in fastmoe.
"""

from fmoe.distributed import DistributedGroupedDataParallel
from fmoe.layers import FMoE
from fmoe.linear import FMoELinear
from fmoe.transformer import FMoETransformerMLP

__all__ = ["DistributedGroupedDataParallel", "FMoE", "FMoELinear", "FMoETransformerMLP"]
