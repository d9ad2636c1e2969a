"""The table of backends, and the choice among them, made per call."""

import logging
from typing import Any

import torch
from torch import Tensor

from fastmoe._errors import unknown_name
from fastmoe.kernels.contract import Backend
from fastmoe.kernels.native.backend import NativeBackend
from fastmoe.kernels.reference import ReferenceBackend
from fastmoe.kernels.torch_ops import TorchBackend
from fastmoe.kernels.triton.backend import TritonBackend

logger = logging.getLogger("fastmoe")

_ALL: tuple[Backend, ...] = (TritonBackend(), NativeBackend(), TorchBackend(), ReferenceBackend())
BACKENDS = {backend.name: backend for backend in _ALL}
PREFERENCE = {"cpu": ["native", "torch"], "cuda": ["triton", "torch"]}
"""What `backend="auto"` tries on a type of device, best first; elsewhere torch. The reference is never chosen unasked.
"""

_logged: set[tuple[str, str, str]] = set()


def check_backend(name: str) -> str:
    """`name` if it is "auto" or a backend's, else a `ValueError` with the nearest known name."""
    if name != "auto" and name not in BACKENDS:
        raise unknown_name("backend", name, ["auto", *BACKENDS])
    return name


def backends() -> dict[str, str]:
    """Every backend by name: "available", or the reason why it is not."""
    return {name: backend.available() or "available" for name, backend in BACKENDS.items()}


def choose_backend(requested: str, op: str, x: Tensor, *more: Any) -> Backend:
    """The backend for kernel `op` on tensors like `x`; `more` as in `Backend.refuses`.

    A backend asked for by name serves the call or raises `ValueError` with its reason; "auto" goes on to the next,
    and logs the reason once.
    """
    names = PREFERENCE.get(x.device.type, ["torch"]) if requested == "auto" else [check_backend(requested)]
    for name in names:
        backend = BACKENDS[name]
        reason = backend.refuses(op, x, *more) or _unavailable(backend)
        if reason is None:
            return backend
        if requested != "auto":
            raise ValueError(f"backend {name!r} cannot serve {op}: {reason}")
        _log_once(backend, op, reason)
    raise ValueError(f"no backend can serve {op} for {x.dtype} on {x.device}: tried {', '.join(names)}")


def _unavailable(backend: Backend) -> str | None:
    """Why a backend cannot run here; while a graph is traced, which cannot look, that is left to the operator."""
    return None if torch.compiler.is_compiling() else backend.available()


def _log_once(backend: Backend, op: str, reason: str) -> None:
    if not torch.compiler.is_compiling() and (backend.name, op, reason) not in _logged:
        _logged.add((backend.name, op, reason))
        level = logging.INFO if backend.optional else logging.WARNING
        logger.log(level, "backend %r cannot serve %s (%s); falling back", backend.name, op, reason)
