"""The folder of a checkpoint, which under its own name is whole at every moment."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

DOCUMENT, METADATA = "fastmoe.json", ".metadata"
FORMAT = 1


@dataclass(frozen=True)
class CheckpointFolder:
    """`path` has two siblings: `.partial`, being written, and `.previous`, whole and about to be replaced."""

    path: Path

    @classmethod
    def of(cls, directory: str | os.PathLike[str]) -> CheckpointFolder:
        return cls(Path(os.path.abspath(directory)))

    @property
    def partial(self) -> Path:
        return self.path.with_name(f"{self.path.name}.partial")

    @property
    def previous(self) -> Path:
        return self.path.with_name(f"{self.path.name}.previous")

    def whole(self) -> Path:
        """Where the checkpoint is; `.previous` where a save was killed between its two renames.

        Raises:
            ValueError: there is none.
        """
        found = self.path if _exists(self.path) else self.previous
        if not _exists(found):
            raise ValueError(f"there is no checkpoint {self.path}")
        if missing := [name for name in (DOCUMENT, METADATA) if not (found / name).is_file()]:
            raise ValueError(f"{found} is not a checkpoint of fastmoe.save: it has no {' and no '.join(missing)}")
        return found

    def begin(self, overwrite: bool) -> None:
        """Make room for a new checkpoint beside the old one; what a killed save has left goes.

        Raises:
            ValueError: there is something already, and it may not or must not be replaced.
        """
        for path in (self.path, self.previous):
            if not _exists(path):
                continue
            if not overwrite:
                raise ValueError(f"{path} is there already: give overwrite=True, or another directory")
            if not (path / DOCUMENT).is_file() and not (path.is_dir() and not any(path.iterdir())):
                raise ValueError(f"{path} is not a checkpoint of fastmoe.save: it is not overwritten")
        remove(self.partial)
        self.partial.mkdir(parents=True)

    def publish(self) -> None:
        """Bring the new checkpoint, whole by now, in place of the old one."""
        sync_folder(self.partial)
        if _exists(self.path):
            remove(self.previous)
            self.path.rename(self.previous)
        self.partial.rename(self.path)
        sync_folder(self.path.parent)
        remove(self.previous)


def write_document(folder: Path, document: dict[str, Any]) -> None:
    with (folder / DOCUMENT).open("w", encoding="utf-8") as file:
        json.dump({"format": FORMAT} | document, file, indent=1)
        file.flush()
        os.fsync(file.fileno())


def read_document(folder: Path) -> dict[str, Any]:
    """What `write_document` wrote.

    Raises:
        ValueError: it cannot be read, or is of another format.
    """
    try:
        document = json.loads((folder / DOCUMENT).read_text(encoding="utf-8"))
        version = document["format"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{folder / DOCUMENT} cannot be read: {error!r}") from error
    if version != FORMAT:
        raise ValueError(f"{folder} has format {version!r}, this fastmoe reads format {FORMAT}")
    return document


def check_files(folder: Path, entries: Iterable[Any]) -> None:
    """Whether the files that DCP's storage entries point to are there, and as long as they must be.

    Raises:
        ValueError: the first that is not.
    """
    needed: dict[str, int] = {}
    for entry in entries:
        needed[entry.relative_path] = max(needed.get(entry.relative_path, 0), entry.offset + entry.length)
    for name, length in needed.items():
        file = folder / name
        if not file.is_file():
            raise ValueError(f"{folder} has no {name}: its files must be on one disk that all processes share")
        if (got := file.stat().st_size) < length:
            raise ValueError(f"{file} is damaged: expected {length} bytes, got {got}")


def remove(path: Path) -> None:
    """Delete a folder with all that is in it, or a file or link; nothing, if there is none."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Bring names to the disk; Windows has no such call for folders."""
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _exists(path: Path) -> bool:
    return os.path.lexists(path)
