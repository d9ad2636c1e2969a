"""The training loop: trainers take turns, one evaluation interval each."""

from __future__ import annotations

import signal
import types
from collections.abc import Callable, Iterable, Sequence

from fastmoe.train.config import RunConfig
from fastmoe.train.failure import during
from fastmoe.train.trainer import Trainer


class Observer:
    """Is told what happens in a run."""

    def logged(self, trainer: Trainer) -> None:
        """`log_every` steps were taken; their losses are in the history."""

    def evaluated(self, trainer: Trainer) -> None:
        """The history has a new evaluation."""


class StopSignals:
    """Turns SIGINT and SIGTERM into a flag, however often they come: under torchrun a process may get one twice."""

    caught: signal.Signals | None = None

    def __enter__(self) -> StopSignals:
        self.before = {number: signal.signal(number, self.handle) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def handle(self, number: int, frame: types.FrameType | None) -> None:
        self.caught = signal.Signals(number)

    def __call__(self) -> bool:
        return self.caught is not None


def train(trainers: Sequence[Trainer], observers: Sequence[Observer], stop: Callable[[], bool]) -> bool:
    """Train all to their last step. When `stop` says so on any process, save all and return False.

    Trainers take turns, so that whatever else the machine does slows them alike.

    Raises:
        RunError: what went wrong, and in which step.
        FloatingPointError: a loss that is not finite.
    """
    for boundary in boundaries(trainers[0].config.optim.steps, trainers[0].config.run):
        for trainer in trainers:
            if not advance(trainer, boundary, observers, stop):
                for each in trainers:
                    with during(f"{each.kind}, step {each.step}"):
                        each.save()
                return False
    return True


def boundaries(steps: int, run: RunConfig) -> Iterable[int]:
    yield from range(0, steps, run.eval_every)
    yield steps


def advance(trainer: Trainer, boundary: int, observers: Sequence[Observer], stop: Callable[[], bool]) -> bool:
    """Step until `boundary` and evaluate there, unless that is done; False if stopped on the way."""
    while trainer.step < boundary:
        with during(f"{trainer.kind}, step {trainer.step + 1}"):
            step(trainer, boundary, observers)
            if trainer.world.any(stop()):
                return False
    if trainer.step == boundary and trainer.step not in trainer.history.valid_steps[-1:]:
        with during(f"{trainer.kind}, step {trainer.step}"):
            evaluate(trainer, observers)
    return True


def step(trainer: Trainer, boundary: int, observers: Sequence[Observer]) -> None:
    """One step, and what is due after it."""
    run = trainer.config.run
    trainer.take_step()
    if trainer.step % run.log_every == 0:
        trainer.flush()
        for observer in observers:
            observer.logged(trainer)
    if trainer.step == boundary:
        evaluate(trainer, observers)
    if trainer.step % run.checkpoint_every == 0 or trainer.step == trainer.config.optim.steps:
        trainer.save()


def evaluate(trainer: Trainer, observers: Sequence[Observer]) -> None:
    trainer.evaluate()
    for observer in observers:
        observer.evaluated(trainer)
