"""Data sets that can be fetched: where from, and how to know that it is them."""

from __future__ import annotations

import hashlib
import shutil
import urllib.request
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

CHUNK = 1 << 20


@dataclass(frozen=True)
class DataSet:
    """A file inside a zip archive on the web."""

    name: str
    url: str
    size: int
    """Of the file, in bytes."""
    sha256: str
    """Of the file."""

    def by_hand(self, folder: Path) -> str:
        path = folder / self.name
        return f"fetch {self.url} on a machine that can; put it here as {path}.zip, or the file in it as {path}"


DATA_SETS = {
    "enwik8": DataSet(
        name="enwik8",
        url="http://mattmahoney.net/dc/enwik8.zip",
        size=100_000_000,
        sha256="2b49720ec4d78c3c9fabaee6e4179a5e997302b3a70029f30f2d582218c024a8",
    )
}


def fetch(data: DataSet, folder: Path, console: Console) -> Path:
    """The data set's file in `folder`, whole or not at all; nothing is fetched where it is there already.

    An archive that was put there by hand is unpacked and checked as one from the web.

    Raises:
        ValueError: it cannot be fetched, or is not what it should be.
    """
    path, archive = folder / data.name, folder / f"{data.name}.zip"
    if path.is_file():
        check(data, path)
        return path
    folder.mkdir(parents=True, exist_ok=True)
    if not archive.is_file():
        download(data, archive, console)
    partial = folder / f"{data.name}.partial"
    try:
        unpack(data, archive, partial)
        check(data, partial)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    archive.unlink()
    return path


def download(data: DataSet, archive: Path, console: Console) -> None:
    partial = archive.with_name(f"{archive.name}.partial")
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    try:
        with (
            urllib.request.urlopen(data.url, timeout=30) as answer,
            partial.open("wb") as file,
            Progress(*columns, console=console) as progress,
        ):
            length = answer.headers.get("Content-Length")
            task = progress.add_task(data.name, total=int(length) if length else None)
            received = 0
            while chunk := answer.read(CHUNK):
                file.write(chunk)
                received += len(chunk)
                progress.update(task, completed=received)
        if length and received != int(length):
            raise OSError(f"the connection ended after {received:,} of {int(length):,} bytes")
        partial.replace(archive)
    except OSError as error:
        raise ValueError(f"cannot fetch {data.url}: {error}. By hand: {data.by_hand(archive.parent)}") from error
    finally:
        partial.unlink(missing_ok=True)


def unpack(data: DataSet, archive: Path, path: Path) -> None:
    try:
        with zipfile.ZipFile(archive) as opened, opened.open(data.name) as source, path.open("wb") as target:
            shutil.copyfileobj(source, target, CHUNK)
    except (zipfile.BadZipFile, KeyError, EOFError) as error:
        raise ValueError(f"{archive} is not {data.name}'s archive: {error}; delete it and try again") from error


def check(data: DataSet, path: Path) -> None:
    """Raises ValueError: the file has another size or checksum than the data set."""
    if (size := path.stat().st_size) != data.size:
        raise ValueError(f"{data.name} has {data.size:,} bytes; {path} has {size:,}")
    with path.open("rb") as file:
        found = sha256_of(file)
    if found != data.sha256:
        raise ValueError(f"{data.name} has the SHA-256 {data.sha256}; {path} has {found}")


def sha256_of(file: IO[bytes]) -> str:
    digest = hashlib.sha256()
    while chunk := file.read(CHUNK):
        digest.update(chunk)
    return digest.hexdigest()
