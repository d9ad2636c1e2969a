"""Where what was compiled or measured once stands for later processes."""

import os
import tempfile
from functools import cache
from pathlib import Path


def cache_folder() -> Path:
    """`$XDG_CACHE_HOME/fastmoe`; where that cannot be written to, a folder of this process alone."""
    return _folder(os.environ.get("XDG_CACHE_HOME") or "")


@cache
def _folder(root: str) -> Path:
    folder = (Path(root) if root else Path.home() / ".cache") / "fastmoe"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return _own_temporary_folder()
    return folder if os.access(folder, os.W_OK) else _own_temporary_folder()


@cache
def _own_temporary_folder() -> Path:
    return Path(tempfile.mkdtemp(prefix="fastmoe-"))
