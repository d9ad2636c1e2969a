"""Load statistics."""

from fastmoe.monitor.stats import LayerStats, mean_entropy
from fastmoe.monitor.tasks import TaskStats

__all__ = ["LayerStats", "TaskStats", "mean_entropy"]
