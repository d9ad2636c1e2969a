"""What a run shows while it trains: progress bars in a terminal, lines elsewhere, curves in TensorBoard."""

from __future__ import annotations

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from torch.utils.tensorboard import SummaryWriter

from fastmoe.train.config import NAMES
from fastmoe.train.history import busiest
from fastmoe.train.loop import Observer
from fastmoe.train.trainer import Trainer


def tokens_per_second(trainer: Trainer, since_step: int = 0, since_seconds: float = 0.0) -> float:
    tokens = (trainer.step - since_step) * trainer.config.optim.batch_size * trainer.config.model.block_size
    return tokens / max(trainer.history.seconds - since_seconds, 1e-9)


def describe(trainer: Trainer) -> str:
    """The newest figures of a trainer in one line."""
    history = trainer.history
    parts = [
        f"train {history.losses[-1]:.3f}" if history.losses else "",
        f"held-out {history.valid_losses[-1]:.3f} bits/byte",
    ]
    if history.losses:
        parts.append(f"{tokens_per_second(trainer):,.0f} tokens/s")
    if history.loads[-1]:
        parts.append(f"busiest expert {busiest(history.loads[-1]):.2f}x the mean")
    return ", ".join(part for part in parts if part)


class ProgressDisplay(Observer):
    """One bar per trainer in a terminal; elsewhere one line per evaluation."""

    def __init__(self, console: Console, trainers: list[Trainer]) -> None:
        self.console = console
        self.progress = Progress(
            TextColumn("{task.description:>5}"),
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[figures]}"),
            console=console,
            disable=not console.is_terminal,
        )
        self.tasks: dict[str, TaskID] = {
            trainer.kind: self.progress.add_task(
                NAMES[trainer.kind], total=trainer.config.optim.steps, completed=trainer.step, figures=""
            )
            for trainer in trainers
        }

    def __enter__(self) -> ProgressDisplay:
        self.progress.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.progress.stop()

    def logged(self, trainer: Trainer) -> None:
        self.progress.update(self.tasks[trainer.kind], completed=trainer.step, figures=describe(trainer))

    def evaluated(self, trainer: Trainer) -> None:
        self.logged(trainer)
        if not self.console.is_terminal:
            steps = trainer.config.optim.steps
            line = f"{NAMES[trainer.kind]:>5} {trainer.step:>6}/{steps}  {describe(trainer)}"
            self.console.print(line, soft_wrap=True)


class TensorBoard(Observer):
    """Scalars in `tensorboard/` of each trainer's folder."""

    def __init__(self, trainers: list[Trainer]) -> None:
        self.writers = {
            trainer.kind: SummaryWriter(str(trainer.folder / "tensorboard"), purge_step=trainer.step + 1)
            for trainer in trainers
        }
        self.last = {trainer.kind: (trainer.step, trainer.history.seconds) for trainer in trainers}

    def __enter__(self) -> TensorBoard:
        return self

    def __exit__(self, *error: object) -> None:
        for writer in self.writers.values():
            writer.close()

    def logged(self, trainer: Trainer) -> None:
        writer = self.writers[trainer.kind]
        scalars = {
            "loss/train": trainer.history.losses[-1],
            "learning_rate": trainer.optimizer.param_groups[0]["lr"],
            "grad_norm": trainer.grad_norm.item(),
            "tokens_per_second": tokens_per_second(trainer, *self.last[trainer.kind]),
        }
        self.last[trainer.kind] = (trainer.step, trainer.history.seconds)
        for name, value in scalars.items():
            writer.add_scalar(name, value, trainer.step)

    def evaluated(self, trainer: Trainer) -> None:
        writer = self.writers[trainer.kind]
        writer.add_scalar("loss/valid", trainer.history.valid_losses[-1], trainer.step)
        for i, load in enumerate(trainer.history.loads[-1]):
            writer.add_scalar(f"expert_load/layer{i}/largest", max(load), trainer.step)
            writer.add_scalar(f"expert_load/layer{i}/smallest", min(load), trainer.step)
