"""Processes that save or load one checkpoint: what one of them raises, all of them raise."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar
from weakref import WeakKeyDictionary

import torch.distributed as dist

from fastmoe._processes import collective

T = TypeVar("T")

_BACKGROUND: WeakKeyDictionary[dist.ProcessGroup, dist.ProcessGroup] = WeakKeyDictionary()


@dataclass(frozen=True)
class Failure:
    """An exception, as other processes are told of it."""

    kind: type[Exception]
    message: str

    @classmethod
    def of(cls, rank: int, error: Exception) -> Failure:
        if isinstance(error, ValueError):
            return cls(ValueError, str(error))
        kind = OSError if isinstance(error, OSError) else RuntimeError
        return cls(kind, f"process {rank}: {type(error).__name__}: {error}")


@dataclass(frozen=True)
class Together:
    """All methods are collective. `group` is None where there is only this process.

    Where one of the processes dies, the others raise a `CollectiveError`.
    """

    group: dist.ProcessGroup | None = None
    rank: int = 0
    size: int = 1

    @classmethod
    def everyone(cls) -> Together:
        """The processes of the default group."""
        if not dist.is_available() or not dist.is_initialized():
            return cls()
        return cls(dist.group.WORLD, dist.get_rank(), dist.get_world_size())

    def in_background(self) -> Together:
        """The same processes, over a group that another thread may use; made once and kept as long as the first.

        Raises:
            ValueError: PyTorch without gloo.
        """
        if self.group is None:
            return self
        if not dist.is_gloo_available():
            raise ValueError("an asynchronous save needs gloo, which this PyTorch is built without")
        if self.group not in _BACKGROUND:
            _BACKGROUND[self.group] = dist.new_group(backend="gloo")
        return Together(_BACKGROUND[self.group], self.rank, self.size)

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def each(self, make: Callable[[], T]) -> T:
        """This process's own answer, once every process has its own."""
        if self.group is None:
            return make()
        answer, error = None, None
        try:
            answer = make()
        except Exception as raised:
            error = raised
        failures = self.all(None if error is None else Failure.of(self.rank, error))
        if any(failures):
            raise _common([failure for failure in failures if failure is not None]) from error
        return answer  # type: ignore[return-value]

    def all(self, value: T) -> list[T]:
        """Every process's value, by rank."""
        if self.group is None:
            return [value]
        gathered: list[T] = [value] * self.size
        with collective():
            dist.all_gather_object(gathered, value, group=self.group)
        return gathered

    def gather(self, make: Callable[[], T]) -> list[T]:
        """On the first process every process's answer, by rank; nothing on the others."""
        answer = self.each(make)
        if self.group is None:
            return [answer]
        gathered: list[T] | None = [answer] * self.size if self.is_first else None
        with collective():
            dist.gather_object(answer, gathered, group=self.group, group_dst=0)
        return gathered or []

    def scatter(self, make: Callable[[], list[T]]) -> T:
        """Of the first process's answers, the one for this process."""
        answers = self.each(lambda: make() if self.is_first else [])
        if self.group is None:
            return answers[0]
        received: list[T] = [answers[0]] if answers else [None]  # type: ignore[list-item]
        with collective():
            dist.scatter_object_list(received, answers or None, group=self.group, group_src=0)
        return received[0]

    def first(self, make: Callable[[], object]) -> None:
        """Only the first process does it; the others wait."""
        self.each(lambda: make() if self.is_first else None)


def _common(failures: list[Failure]) -> Exception:
    kinds = {failure.kind for failure in failures}
    kind = kinds.pop() if len(kinds) == 1 else RuntimeError
    return kind("\n".join(dict.fromkeys(failure.message for failure in failures)))
