"""Load statistics: of one pass (`stats`), over windows of passes (`counters`, `snapshot`); and their `sinks`."""

from fastmoe.monitor.snapshot import LayerLoad, LoadSnapshot
from fastmoe.monitor.stats import LayerStats, mean_entropy
from fastmoe.monitor.tasks import TaskStats

__all__ = ["LayerLoad", "LayerStats", "LoadSnapshot", "TaskStats", "mean_entropy"]
