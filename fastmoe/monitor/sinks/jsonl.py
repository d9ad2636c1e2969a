"""JSON lines: one line per snapshot, readable while it is written and after a kill."""

import json
from pathlib import Path
from typing import Any

from fastmoe.monitor.snapshot import LoadSnapshot

Records = list[tuple[int, LoadSnapshot]]


class JsonLines:
    """Appends `{"step": ..., "layers": {name: LayerLoad.to_plain()}}`.

    Args:
        truncate_after: keep only earlier lines up to this step, for a run resumed from there; None keeps all, 0 none.
    """

    def __init__(self, path: Path, truncate_after: int | None = None) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        kept = [line for line in _lines(path) if truncate_after is None or line["step"] <= truncate_after]
        partial = path.with_suffix(".partial")
        partial.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")
        partial.replace(path)
        self.file = path.open("a", encoding="utf-8")

    def write(self, step: int, snapshot: LoadSnapshot) -> None:
        self.file.write(json.dumps({"step": step, "layers": snapshot.to_plain()}) + "\n")
        self.file.flush()

    def close(self) -> None:
        self.file.close()


def read_jsonl(path: Path) -> Records:
    """Steps and snapshots; a last line cut off by a kill is left out, a missing file has none.

    Raises:
        ValueError: a line that is no snapshot.
    """
    try:
        return [(line["step"], LoadSnapshot.from_plain(line["layers"])) for line in _lines(path)]
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} has a line that is no load snapshot: {error!r}") from error


def _lines(path: Path) -> list[dict[str, Any]]:
    text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    whole = text[: text.rfind("\n") + 1]  # what follows the last line break was cut off
    lines = []
    for number, line in enumerate(whole.splitlines(), 1):
        try:
            lines.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {number}, is not JSON: {error}") from error
    return lines
