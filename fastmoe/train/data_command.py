"""`fastmoe data`: fetch a data set, and check it."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from fastmoe.train.download import DATA_SETS, fetch

BY_HAND = """Without internet: put the archive, such as enwik8.zip, or the file in it, into the folder. It is checked in
place of fetching. An archive of your own is kept; one that was fetched is deleted after unpacking."""


def main(arguments: Sequence[str]) -> int:
    """Fetch; 0: it is there and whole; 2: it cannot be had, or is not what it should be; 130: interrupted."""
    parser = argparse.ArgumentParser(
        prog="fastmoe data", description="Fetch a data set from its home page; check it.", epilog=BY_HAND
    )
    parser.add_argument("name", choices=DATA_SETS)
    parser.add_argument("--to", type=Path, default=Path("data"), help="folder to put it in; default: data")
    given = parser.parse_args(arguments)
    data = DATA_SETS[given.name]
    try:
        path = fetch(data, given.to, Console(highlight=False))
    except ValueError as error:
        return failed(error, 2)
    except OSError as error:
        return failed(f"cannot read and write in {given.to}: {error}", 2)
    except KeyboardInterrupt:
        return failed(f"interrupted. Call it again, or {data.by_hand(given.to)}", 130)
    print(f"{path}: {path.stat().st_size:,} bytes, checksum right. fastmoe train --data {path}")
    return 0


def failed(message: object, status: int) -> int:
    print(f"fastmoe data: {message}", file=sys.stderr)
    return status
