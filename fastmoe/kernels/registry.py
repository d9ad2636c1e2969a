"""The table of backends, and the choice among them, made per call."""

import logging

import torch
from torch import Tensor

from fastmoe._errors import unknown_name
from fastmoe.kernels.contract import Backend
from fastmoe.kernels.reference import ReferenceBackend
from fastmoe.kernels.torch_ops import TorchBackend

logger = logging.getLogger("fastmoe")

BACKENDS: dict[str, Backend] = {backend.name: backend for backend in (TorchBackend(), ReferenceBackend())}
PREFERENCE = ["torch"]
"""What `backend="auto"` tries, best first. The reference is never chosen unasked."""

_logged: set[tuple[str, str, str]] = set()


def check_backend(name: str) -> str:
    """`name` if it is "auto" or a backend's, else a `ValueError` with the nearest known name."""
    if name != "auto" and name not in BACKENDS:
        raise unknown_name("backend", name, ["auto", *BACKENDS])
    return name


def backends() -> dict[str, str]:
    """Every backend by name: "available", or the reason why it is not."""
    return {name: backend.available() or "available" for name, backend in BACKENDS.items()}


def choose_backend(requested: str, op: str, x: Tensor) -> Backend:
    """The backend for kernel `op` on tensors like `x`.

    A backend asked for by name serves the call or raises `ValueError` with its reason; "auto" goes on to the next,
    and logs the reason once.
    """
    for name in PREFERENCE if requested == "auto" else [check_backend(requested)]:
        backend = BACKENDS[name]
        reason = backend.available() or backend.refuses(op, x)
        if reason is None:
            return backend
        if requested != "auto":
            raise ValueError(f"backend {name!r} cannot serve {op}: {reason}")
        _log_once(name, op, reason)
    raise ValueError(f"no backend can serve {op} for {x.dtype} on {x.device}: tried {', '.join(PREFERENCE)}")


def _log_once(name: str, op: str, reason: str) -> None:
    if not torch.compiler.is_compiling() and (name, op, reason) not in _logged:
        _logged.add((name, op, reason))
        logger.warning("backend %r cannot serve %s (%s); falling back", name, op, reason)
