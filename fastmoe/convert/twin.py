"""A block's twin: a copy with made-up float64 weights on the CPU, to be run without touching the block.

Made-up weights also serve a block on the meta device, and one whose own weights would hide what it does (a last
projection that starts at zero).
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

ROWS, TOLERANCE = 16, 1e-5
PERIOD = 131071  # a prime, so that no two rows of a usual weight are alike


@contextmanager
def undisturbed() -> Iterator[None]:
    """Run twins with no gradient and no autocast, and leave the random number generator as it was."""
    with torch.no_grad(), torch.random.fork_rng(devices=[]), torch.autocast("cpu", enabled=False):
        yield


def twin_of(block: nn.Module) -> nn.Module | None:
    """The twin of `block`, None when it cannot be copied."""
    generator = torch.Generator("cpu").manual_seed(0)
    made_up = {id(p): nn.Parameter(_values(p.shape, generator), requires_grad=False) for p in block.parameters()}
    try:
        return copy.deepcopy(block, made_up).to(device="cpu", dtype=torch.float64)
    except Exception:
        return None


def _values(shape: torch.Size, generator: torch.Generator) -> Tensor:
    count = shape.numel()
    base = torch.randn(min(count, PERIOD), generator=generator, dtype=torch.float64, device="cpu")
    repeats = -(-count // max(len(base), 1))
    return base.repeat(repeats)[:count].view(shape) / max(min(shape, default=1), 1) ** 0.5


def make_rows(d_model: int) -> Tensor:
    """Rows `(T, D)` of sizes 1/2 to 64, so that every part of an activation's curve is met."""
    generator = torch.Generator("cpu").manual_seed(1)
    rows_TD = torch.randn(ROWS, d_model, generator=generator, dtype=torch.float64, device="cpu")
    return rows_TD * torch.logspace(-1, 6, ROWS, base=2, dtype=torch.float64, device="cpu")[:, None]


def run(twin: nn.Module, x_TD: Tensor) -> Tensor | None:
    """The twin's output rows for two sequences or, where it takes none, for plain rows; None if it takes neither."""
    y_TD = _call(twin, x_TD.view(2, -1, x_TD.shape[1]))
    return _call(twin, x_TD) if y_TD is None else y_TD


def _call(twin: nn.Module, x: Tensor) -> Tensor | None:
    try:
        y = twin(x.clone())
    except Exception:
        return None
    return y.flatten(0, -2) if isinstance(y, Tensor) and y.shape[:-1] == x.shape[:-1] else None


def agree(got: Tensor, expected: Tensor) -> bool:
    """Whether both hold the same rows, each within `TOLERANCE` of its largest element."""
    if got.shape != expected.shape or not torch.isfinite(got).all():
        return False
    allowed = TOLERANCE * expected.abs().amax(dim=-1)
    return bool(((got - expected).abs().amax(dim=-1) <= allowed).all())


def mixes_rows(block: nn.Module, d_model: int) -> bool:
    """Whether a row's output depends on the other rows, as in attention; False when the block cannot be run here."""
    with undisturbed():
        twin = twin_of(block)
        if twin is None:
            return False
        x_TD = make_rows(d_model)
        whole = run(twin.eval(), x_TD)
        parts = [_call(twin, x) for x in x_TD.split(5)]
    if whole is None:
        return False
    return not all(part is None or agree(part, rows) for part, rows in zip(parts, whole.split(5), strict=True))
