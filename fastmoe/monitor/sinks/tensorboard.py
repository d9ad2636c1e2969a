"""Scalars and a heat map in TensorBoard."""

from pathlib import Path

import torch
from torch.utils.tensorboard import SummaryWriter

from fastmoe.monitor.snapshot import LayerLoad, LoadSnapshot


class TensorBoardLoad:
    """`load/<layer>/<figure>` for every layer, and `load/heat_map`: a row per layer, a column per expert.

    Args:
        folder: of its own: TensorBoard reads one growing file per folder.
        purge_step: TensorBoard forgets what was written from this step on, for a resumed run.
    """

    def __init__(self, folder: Path, purge_step: int | None = None) -> None:
        self.writer = SummaryWriter(str(folder), purge_step=purge_step)

    def write(self, step: int, snapshot: LoadSnapshot) -> None:
        for name, load in snapshot.items():
            for figure, value in figures(load).items():
                self.writer.add_scalar(f"load/{name or 'model'}/{figure}", value, step)
        self.writer.add_image("load/heat_map", heat_map(snapshot), step)
        self.writer.flush()

    def close(self) -> None:
        self.writer.close()


def figures(load: LayerLoad) -> dict[str, float]:
    made = {name: getattr(load, name) for name in ("max_over_mean", "cv", "entropy", "drop_rate", "unrouted_tokens")}
    made["dead"] = len(load.dead)
    optional = {"router_entropy": load.router_entropy, "mean_weight": load.mean_weight}
    made |= {name: value for name, value in optional.items() if value is not None}
    return made | {f"loss/{name}": value for name, value in load.losses.items()}


def heat_map(snapshot: LoadSnapshot, pixels: int = 16) -> torch.Tensor:
    """`(3, height, width)` in 0..1: white is no load, full orange twice the mean or more, grey is no expert."""
    width = max(len(load.counts) for load in snapshot.values())
    image = torch.full((3, len(snapshot), width), 0.5)
    full = torch.tensor([0.85, 0.35, 0.0])
    for row, load in enumerate(snapshot.values()):
        heat_E = (torch.tensor(load.share) * len(load.counts) / 2).clamp(max=1)
        image[:, row, : len(heat_E)] = 1 - heat_E * (1 - full[:, None])
    return image.repeat_interleave(pixels, 1).repeat_interleave(pixels, 2)
