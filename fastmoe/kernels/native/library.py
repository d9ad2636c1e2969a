"""Compile the C++ source beside this file, once for each machine and source, and load it.

Nothing is compiled at install time. The result stands in the user's cache folder under a name made of source, compiler,
flags and processor, so that a change of any of them compiles anew.
"""

import ctypes
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path

from fastmoe.kernels.cache import cache_folder

logger = logging.getLogger("fastmoe")

FLAGS = ["-O3", "-march=native", "-std=gnu++17", "-fopenmp", "-shared", "-fPIC"]
_SOURCES = ["vector.h", "activation.h", "gemm.h", "expert_mlp.cpp"]
_FOLDER = Path(__file__).parent


def usable() -> bool:
    """Whether there is a library; if not, that is logged, once."""
    library = load()
    if isinstance(library, str):
        _log_missing(library)
    return not isinstance(library, str)


@cache
def _log_missing(reason: str) -> None:
    logger.info("the native backend cannot run (%s); the torch backend goes on", reason)


@cache
def load() -> ctypes.CDLL | str:
    """The library, or the reason why there is none."""
    if sys.platform != "linux":
        return "it needs Linux, whose OpenMP PyTorch shares"
    compiler = shutil.which("g++") or shutil.which("c++")
    if compiler is None:
        return "no C++ compiler was found: g++ or c++"
    try:
        return _declare(_loaded(compiler))
    except subprocess.CalledProcessError as error:
        return f"{compiler} could not compile it: {(error.stderr or str(error)).strip()[:500]}"
    except OSError as error:
        return f"it could not be built or loaded: {error}"


def _loaded(compiler: str) -> ctypes.CDLL:
    target = _compiled(compiler)
    try:
        return ctypes.CDLL(str(target))
    except OSError:  # what stands in the cache is damaged
        target.unlink(missing_ok=True)
        return ctypes.CDLL(str(_compiled(compiler)))


def _compiled(compiler: str) -> Path:
    target = cache_folder() / f"expert_mlp-{_fingerprint(compiler)}.so"
    if target.exists():
        return target
    logger.info("compiling the CPU kernels with %s, once, into %s", compiler, target)
    handle, unfinished = tempfile.mkstemp(suffix=".so", dir=target.parent)
    os.close(handle)
    try:
        command = [compiler, *FLAGS, "-w", "-o", unfinished, str(_FOLDER / "expert_mlp.cpp")]
        subprocess.run(command, check=True, capture_output=True, text=True)
        os.replace(unfinished, target)
    finally:
        Path(unfinished).unlink(missing_ok=True)
    return target


def _fingerprint(compiler: str) -> str:
    version = subprocess.run([compiler, "--version"], check=True, capture_output=True, text=True).stdout
    parts = [*(_FOLDER.joinpath(name).read_text() for name in _SOURCES), compiler, version, *FLAGS, _processor()]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def _processor() -> str:
    """What `-march=native` goes by."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    return platform.machine() + "".join(sorted({line for line in lines if line.startswith(("flags", "Features"))}))


def _declare(library: ctypes.CDLL) -> ctypes.CDLL:
    for function in (library.fastmoe_forward, library.fastmoe_backward):
        function.argtypes, function.restype = [ctypes.c_void_p, ctypes.c_int], ctypes.c_size_t
    library.fastmoe_plan.argtypes = [ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p, ctypes.c_void_p]
    library.fastmoe_plan.restype = ctypes.c_int
    library.fastmoe_amx.argtypes, library.fastmoe_amx.restype = [], ctypes.c_int
    return library
