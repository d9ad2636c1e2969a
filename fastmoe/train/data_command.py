"""`fastmoe data`: fetch a data set, and check it."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from fastmoe.train.download import DATA_SETS, fetch


def main(arguments: Sequence[str]) -> int:
    """Fetch; 0: it is there and whole; 2: it cannot be had, or is not what it should be."""
    parser = argparse.ArgumentParser(prog="fastmoe data", description="Fetch a data set from its home page; check it.")
    parser.add_argument("name", choices=DATA_SETS)
    parser.add_argument("--to", type=Path, default=Path("data"), help="folder to put it in; default: data")
    given = parser.parse_args(arguments)
    try:
        path = fetch(DATA_SETS[given.name], given.to, Console(highlight=False))
    except (ValueError, OSError) as error:
        print(f"fastmoe data: {error}", file=sys.stderr)
        return 2
    print(f"{path}: {path.stat().st_size:,} bytes, checksum right. fastmoe train --data {path}")
    return 0
