"""Build and check all contenders of a problem."""

from dataclasses import dataclass

import torch
from torch import Tensor

from fastmoe.bench.contenders import DENSE, OURS, Builder
from fastmoe.bench.problem import Contender, Problem, RefusedError

LIMITS = {torch.float32: 1e-5, torch.float64: 1e-12}
LIMIT_HALF = 3e-2
_PIECE = 1 << 26  # numbers compared at a time


@dataclass
class Field:
    """Who runs, how far each is from the truth, and why the others do not run."""

    contenders: dict[str, Contender]
    errors: dict[str, float]
    left_out: dict[str, str]


def gather(p: Problem, builders: dict[str, Builder]) -> Field:
    """Build every contender and run it once; whoever cannot, or is wrong, is left out with the reason."""
    found = Field({}, {}, {})
    for name, build in builders.items():
        try:
            contender = build(p)
            found.errors[name] = check(p, contender)
            contender.clear()
            found.contenders[name] = contender
        except RefusedError as reason:
            if name in (OURS, DENSE):
                raise RuntimeError(f"{name}: {reason}") from reason
            found.left_out[name] = str(reason)
        except Exception as error:  # whatever another library raises
            if name in (OURS, DENSE):
                raise
            found.left_out[name] = f"failed: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        clear(p)
    return found


def check(p: Problem, contender: Contender) -> float:
    """The largest relative error of output and gradients; 0 where the contender's mathematics is another.

    Raises:
        RefusedError: the error is above the dtype's limit, or a number is not finite.
    """
    if p.backward:
        contender.step()
    with torch.no_grad():
        y_TD = contender.forward()
    if contender.grads is None:
        if not bool(y_TD.isfinite().all()):
            raise RefusedError("wrong: its output is not finite")
        return 0.0
    got = [y_TD, *(contender.grads() if p.backward else [])]
    errors = [relative_error(g, t) for g, t in zip(got, p.truth, strict=True)]
    limit = LIMITS.get(p.dtype, LIMIT_HALF)
    for error in errors:
        if not error < limit:  # NaN is not
            raise RefusedError(f"wrong: relative error {error:.2g}, limit {limit:.2g}")
    return max(errors)


def relative_error(got: Tensor, truth: Tensor) -> float:
    """In norm and in float64, a piece at a time."""
    rows = max(1, _PIECE // max(1, truth[:1].numel()))
    off, scale = 0.0, 0.0
    for g, t in zip(got.split(rows), truth.split(rows), strict=True):
        off += float((g.double() - t).square().sum())
        scale += float(t.double().square().sum())
    return (off / (scale or 1.0)) ** 0.5


def clear(p: Problem) -> None:
    for leaf in p.leaves:
        leaf.grad = None
