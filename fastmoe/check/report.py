"""What a check found, and how it is told."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

SHOWN = 10
HEADINGS = ("greatest relative difference", "to one process", "one process to itself", "where")


@dataclass(frozen=True)
class Difference:
    """The greatest of one tensor, relative to its greatest value on one process.

    Attributes:
        quantity: outputs, loss, gradient norm, gradients or weights.
        name: the step, or the parameter.
        layout: between the layout that is checked and one process.
        alone: between two runs on one process: above 0 where training draws random numbers.
    """

    quantity: str
    name: str
    layout: float
    alone: float


@dataclass(frozen=True)
class Report:
    """The result of `check_layout`, the same on every process; `str()` is a table.

    Attributes:
        title: what was checked.
        tolerance: the greatest difference that passes.
        differences: of every tensor.
    """

    title: str
    tolerance: float
    differences: tuple[Difference, ...]

    @property
    def failed(self) -> tuple[Difference, ...]:
        """Those above the tolerance, the greatest first."""
        above = (d for d in self.differences if not d.layout <= self.tolerance)
        return tuple(sorted(above, key=lambda d: d.layout, reverse=True))

    @property
    def passed(self) -> bool:
        return not self.failed

    @property
    def random(self) -> bool:
        """Whether two runs on one process differ by more than the tolerance, so that nothing can be said."""
        return any(not d.alone <= self.tolerance for d in self.differences)

    def worst(self) -> dict[str, Difference]:
        """The greatest difference of each quantity."""
        worst: dict[str, Difference] = {}
        for one in self.differences:
            if one.quantity not in worst or one.layout > worst[one.quantity].layout:
                worst[one.quantity] = one
        return worst

    def table(self, verbose: bool = False) -> str:
        """Worst of each quantity, or everything; and the verdict."""
        shown = self.differences if verbose else self.worst().values()
        alone = {q: max(d.alone for d in self.differences if d.quantity == q) for q in self.worst()}
        rows = [HEADINGS]
        rows += [
            (d.quantity, f"{d.layout:.1e}", f"{d.alone if verbose else alone[d.quantity]:.1e}", d.name) for d in shown
        ]
        widths = [max(len(row[i]) for row in rows) for i in range(3)]
        lines = (f"{a:<{widths[0]}}  {b:>{widths[1]}}  {c:>{widths[2]}}  {d}" for a, b, c, d in rows)
        return "\n".join([self.title, *lines, *self._verdict(verbose)])

    def __str__(self) -> str:
        return self.table()

    def _verdict(self, verbose: bool) -> Iterator[str]:
        if self.passed:
            yield f"PASS: no difference is above {self.tolerance:g}"
        elif self.random:
            largest = max(d.alone for d in self.differences)
            yield (
                f"UNDECIDED: two runs on one process differ by up to {largest:.1e}, because training draws random "
                "numbers: switch them off (dropout, a router's noise or jitter) to compare layouts"
            )
        else:
            failed = self.failed
            yield f"FAIL: above {self.tolerance:g} are"
            yield from (f"  {d.layout:.1e}  {d.quantity}: {d.name}" for d in failed[: None if verbose else SHOWN])
            if not verbose and len(failed) > SHOWN:
                yield f"  and {len(failed) - SHOWN} more: --verbose shows all"
