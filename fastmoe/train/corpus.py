"""What a model learns: a file's bytes, or the source text of the running Python's standard library."""

from __future__ import annotations

import gzip
import hashlib
import platform
import sysconfig
import zipfile
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

ENWIK8_SPLIT = (90_000_000, 5_000_000, 5_000_000)
ENWIK8_NAMES = ("enwik8", "enwik8.gz", "enwik8.zip")
STDLIB_LIMIT = 16_000_000
NOT_STDLIB = {"site-packages", "dist-packages", "test", "tests", "idle_test"}


@dataclass(frozen=True)
class Corpus:
    """Bytes in three parts, each a uint8 tensor; `test` is empty where there are two files."""

    name: str
    train: Tensor
    valid: Tensor
    test: Tensor
    sha256: str
    """Of the file; where there are two, of their two digests: other files and other cuts of the same bytes differ."""

    def __str__(self) -> str:
        sizes = " / ".join(f"{part.numel():,}" for part in (self.train, self.valid, self.test))
        return f"{self.name}: {sizes} bytes to train / validate / test"


def load_corpus(path: Path | None, valid: Path | None = None) -> Corpus:
    """The file's bytes, split 90/5/5 percent (a file named enwik8: 90/5/5 million bytes).

    With a file `valid` nothing is split: all of `path` is trained on, all of `valid` validates, nothing tests.

    Raises:
        ValueError: no such file, an empty one, one that cannot be unpacked, or an enwik8 of another size.
    """
    content, name = read_source(path)
    if valid is not None:
        held_out = read_file(valid)
        digest = hashlib.sha256(hashlib.sha256(content).digest() + hashlib.sha256(held_out).digest()).hexdigest()
        nothing = torch.empty(0, dtype=torch.uint8)
        return Corpus(f"{name} and {valid.name}", as_tensor(content), as_tensor(held_out), nothing, digest)
    sizes = split_sizes(name, len(content))
    if min(sizes) == 0:
        raise ValueError(f"{name} is too short to split: {len(content)} bytes")
    train, validate, test = as_tensor(content).split(sizes)
    return Corpus(name, train, validate, test, hashlib.sha256(content).hexdigest())


def read_source(path: Path | None) -> tuple[bytes, str]:
    """The bytes to learn, and what to call them."""
    if path is None:
        content = stdlib_source(Path(sysconfig.get_paths()["stdlib"]))
        return content, f"standard library of {platform.python_implementation()} {platform.python_version()}"
    content = read_file(path)
    if path.name in ENWIK8_NAMES and len(content) != sum(ENWIK8_SPLIT):
        raise ValueError(f"enwik8 has {sum(ENWIK8_SPLIT):,} bytes; {path} has {len(content):,}")
    return content, path.name


def as_tensor(content: bytes) -> Tensor:
    return torch.frombuffer(bytearray(content), dtype=torch.uint8)


def split_sizes(name: str, size: int) -> tuple[int, int, int]:
    return ENWIK8_SPLIT if name in ENWIK8_NAMES else percent_split(size)


def percent_split(size: int) -> tuple[int, int, int]:
    held_out = size // 20
    return size - 2 * held_out, held_out, held_out


def read_file(path: Path) -> bytes:
    if not path.is_file():
        raise ValueError(f"no such data file: {path}")
    try:
        content = unpack(path)
    except Exception as error:  # gzip and zipfile let through whatever their decompressors raise
        raise ValueError(f"cannot read {path}: {error}") from error
    if not content:
        raise ValueError(f"{path} must not be empty")
    return content


def unpack(path: Path) -> bytes:
    match path.suffix.lower():
        case ".gz":
            return gzip.decompress(path.read_bytes())
        case ".zip":
            return read_zip(path)
        case _:
            return path.read_bytes()


def read_zip(path: Path) -> bytes:
    with zipfile.ZipFile(path) as archive:
        names = [info.filename for info in archive.infolist() if not info.is_dir()]
        if len(names) != 1:
            raise ValueError(f"it must hold exactly one file; it holds {len(names)}: {', '.join(names[:5])}")
        return archive.read(names[0])


def stdlib_source(root: Path) -> bytes:
    """All modules under `root` in the order of their names, without tests and installed packages."""
    texts: list[bytes] = []
    size = 0
    for path in sorted(root.rglob("*.py"), key=lambda path: path.relative_to(root).as_posix()):
        if NOT_STDLIB & set(path.relative_to(root).parts) or path.name.startswith("_sysconfigdata"):
            continue
        texts.append(path.read_bytes())
        size += len(texts[-1])
        if size > STDLIB_LIMIT:
            break
    if not texts:
        raise ValueError(f"this Python has no standard library source in {root}; give a file with --data")
    return b"".join(texts)[:STDLIB_LIMIT]
