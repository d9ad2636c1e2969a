"""Data sets that can be fetched: where from, and how to know that it is them."""

from __future__ import annotations

import hashlib
import urllib.request
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.client import HTTPException, HTTPResponse
from pathlib import Path
from typing import BinaryIO

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

    An archive that was put there by hand is unpacked and checked as one from the web, and kept.

    Raises:
        ValueError: it cannot be fetched, or is not what it should be.
        OSError: the folder cannot be read or written.
    """
    path = folder / data.name
    make_place(path)
    if path.is_file():
        with blamed(data, path, f"Delete it and try again, or {data.by_hand(folder)}"):
            check(data, path)
    else:
        make(data, path, console)
    return path


def make_place(path: Path) -> None:
    """The folder of `path`, before anything is fetched for it."""
    folder = path.parent
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"--to must be a folder to put {path.name} in; {folder} is a file")
    if path.exists() and not path.is_file():
        raise ValueError(f"{path} must be a file; it is a folder. Move it away, or choose another place with --to")
    folder.mkdir(parents=True, exist_ok=True)


def make(data: DataSet, path: Path, console: Console) -> None:
    """From the archive beside `path`, or from the web; what was fetched is deleted, right or wrong."""
    own, by_hand = path.with_name(f"{path.name}.zip"), data.by_hand(path.parent)
    fetched, unpacked = (path.with_name(f"{name}.partial") for name in (own.name, path.name))
    try:
        if own.is_file():
            with blamed(data, own, f"Delete it and try again, or {by_hand}"):
                unpack(data, own, unpacked)
        else:
            with blamed(data, data.url, f"Try again, or {by_hand}"):
                download(data, fetched, console)
                unpack(data, fetched, unpacked)
        unpacked.replace(path)
    finally:
        for partial in (fetched, unpacked):
            partial.unlink(missing_ok=True)


@contextmanager
def blamed(data: DataSet, source: Path | str, remedy: str) -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{data.name} cannot be had from {source}: {error}. {remedy}") from error


def download(data: DataSet, archive: Path, console: Console) -> None:
    try:
        with archive.open("wb") as file, urllib.request.urlopen(data.url, timeout=30) as answer:
            receive(answer, file, data.name, console)
    except HTTPException as error:
        raise ValueError(f"the server's answer is cut off, or is not HTTP: {error!r}") from error
    except OSError as error:
        raise ValueError(str(error)) from error


def receive(answer: HTTPResponse, file: BinaryIO, name: str, console: Console) -> None:
    length, received = content_length(answer), 0
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, console=console) as progress:
        task = progress.add_task(name, total=length)
        while chunk := answer.read(CHUNK):
            received += file.write(chunk)
            progress.update(task, completed=received)
    if length is not None and received != length:
        raise ValueError(f"the connection ended after {received:,} of {length:,} bytes")


def content_length(answer: HTTPResponse) -> int | None:
    length = answer.getheader("Content-Length")
    if length is None:
        return None
    if not length.isdecimal():
        raise ValueError(f"the server's Content-Length must be a number of bytes; it is {length!r}")
    return int(length)


def unpack(data: DataSet, archive: Path, path: Path) -> None:
    with path.open("wb") as target:
        for chunk in chunks(archive, data.name):
            target.write(chunk)
    check(data, path)


def chunks(archive: Path, name: str) -> Iterator[bytes]:
    """Of the file `name` in the archive. They are written outside the `try`: a full disk is not the archive's fault."""
    try:
        with zipfile.ZipFile(archive) as opened, opened.open(name) as source:
            while chunk := source.read(CHUNK):
                yield chunk
    except Exception as error:  # zipfile lets through whatever its decompressors raise
        raise ValueError(f"it cannot be unpacked: {error}") from error


def check(data: DataSet, path: Path) -> None:
    """Raises ValueError: the file has another size or checksum than the data set."""
    if (size := path.stat().st_size) != data.size:
        raise ValueError(f"{data.name} has {data.size:,} bytes; this has {size:,}")
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != data.sha256:
        raise ValueError(f"{data.name} has the SHA-256 {data.sha256}; this has {found}")
