"""Load statistics."""

from fastmoe.monitor.stats import LayerStats, mean_entropy

__all__ = ["LayerStats", "mean_entropy"]
