"""Data and expert parallelism over a DeviceMesh."""

from fastmoe._processes import CollectiveError
from fastmoe.parallel.clip import clip_grad_norm_
from fastmoe.parallel.engines import no_sync
from fastmoe.parallel.layout import Layout
from fastmoe.parallel.materialize import materialize
from fastmoe.parallel.parallelize import parallelize
from fastmoe.parallel.shard import shard_layer

__all__ = ["CollectiveError", "Layout", "clip_grad_norm_", "materialize", "no_sync", "parallelize", "shard_layer"]
