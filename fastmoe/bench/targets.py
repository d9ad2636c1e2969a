"""What the GPU presets' rows must reach, and whether they do."""

from collections.abc import Iterator
from typing import NamedTuple

from fastmoe.bench.contenders import DENSE, OURS
from fastmoe.bench.graphs import in_graph_name


class Target(NamedTuple):
    """`value` None: the contender did not run."""

    what: str
    value: float | None
    limit: float
    at_least: bool

    def named(self) -> dict:
        if self.value is None:
            return self._asdict() | {"met": None}
        met = self.value >= self.limit if self.at_least else self.value <= self.limit
        return self._asdict() | {"met": met}


LOOPS = ("brute-force loop", "ModuleList loop")
GROUPED = ("F.grouped_mm", "HF grouped_mm")
LEAST_TIMES_A_LOOP = 47.0  # more than FastMoE's paper
LEAST_TIMES_GROUPED = 1.0
LEAST_OF_MATMUL = 0.60
MOST_OVER_DENSE = 1.25
MOST_OVER_BYTES = 1.4
MOST_OVER_FORMULA = 1.05


def targets(preset: str, result: dict) -> list[dict]:
    """Every target of a GPU preset, one for each row and pass; none for another preset."""
    return [target.named() for row in result["rows"] for target in _of_row(preset, row)]


def _of_row(preset: str, row: dict) -> Iterator[Target]:
    case = f"{', '.join(f'{k} {v}' for k, v in row['shape'].items())}, {row['dtype']}, {row['activation']}"
    for mode, found in row["modes"].items():
        contenders = found["contenders"]
        ours = contenders[OURS]
        if preset == "gpu-large":
            yield Target(f"{case}, {mode}: of matmul", ours["of_matmul"], LEAST_OF_MATMUL, True)
            for name in GROUPED:
                value = _figure(contenders, name, "times_ours")
                yield Target(f"{case}, {mode}: {name}, times ours", value, LEAST_TIMES_GROUPED, True)
        elif preset == "gpu-dense":
            yield Target(f"{case}, {mode}: over {DENSE}", ours["over_dense"], MOST_OVER_DENSE, False)
        elif preset == "gpu-decode":
            for name in (OURS, in_graph_name(OURS)):
                value = _figure(contenders, name, "over_bytes")
                yield Target(f"{case}, {name}: over bytes", value, MOST_OVER_BYTES, False)
        elif preset == "gpu-hf":
            value = _figure(contenders, "HF grouped_mm", "times_ours")
            yield Target(f"{case}, {mode}: HF grouped_mm, times HF fastmoe", value, LEAST_TIMES_GROUPED, True)
        elif preset == "gpu-paper" and row["shape"]["E"] >= 64 and mode == "forward+backward":
            for name in LOOPS:
                value = _figure(contenders, name, "times_ours")
                yield Target(f"{case}, {mode}: {name}, times ours", value, LEAST_TIMES_A_LOOP, True)
    if preset in ("gpu-large", "gpu-dense", "gpu-paper") and "memory" in row:
        kept = row["memory"][OURS]
        value = kept["kept_bytes"] / kept["formula_bytes"]
        yield Target(f"{case}: kept, over formula", value, MOST_OVER_FORMULA, False)


def _figure(contenders: dict, name: str, figure: str) -> float | None:
    return contenders[name][figure] if name in contenders else None
