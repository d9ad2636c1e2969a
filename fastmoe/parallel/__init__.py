"""Data and expert parallelism over a DeviceMesh."""

from fastmoe._processes import CollectiveError
from fastmoe.parallel.checkpoint import PendingSave, load, save
from fastmoe.parallel.clip import clip_grad_norm_
from fastmoe.parallel.engines import no_sync
from fastmoe.parallel.layout import Layout
from fastmoe.parallel.materialize import materialize
from fastmoe.parallel.parallelize import parallelize
from fastmoe.parallel.shard import shard_layer

__all__ = [
    "CollectiveError",
    "Layout",
    "PendingSave",
    "clip_grad_norm_",
    "load",
    "materialize",
    "no_sync",
    "parallelize",
    "save",
    "shard_layer",
]
