"""Imports point one way, and `import fastmoe` brings in PyTorch alone; `fmoe` stands on top of it."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import fastmoe

PACKAGE = Path(fastmoe.__file__).parent

# A part may import itself and parts of lower rank. Parts of one rank do not import each other.
RANKS = {
    "_backward": 0, "_device": 0, "_errors": 0, "_processes": 0, "_seeds": 0, "_multiplier": 0,
    "kernels": 1,
    "routers": 2, "experts": 2, "dispatch": 2, "monitor": 2,
    "layer": 3, "mmoe": 3,
    "model": 4,
    "parameters": 5, "load_monitor": 5, "token_ids": 5,
    "parallel": 6,
    "convert": 7, "models": 7,
    "integrations": 8, "tabular": 8,
    "hosts": 9, "train": 9, "bench": 9, "check": 9, "plan": 9,
    "tune": 10,
    "cli": 11,
    "__main__": 12,
}  # fmt: skip
EXTRAS = {
    "triton",
    "transformers",
    "megatron",
    "matplotlib",
    "tensorboard",
    "tyro",
    "rich",
    "numpy",
    "plotly",
    "polars",
}


def imported_modules(source, package):
    """Full names of what a module's source imports, wherever in it; `package` is what relative imports start from."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            prefix = ".".join([*base, *([node.module] if node.module else [])])
            yield from (f"{prefix}.{alias.name}" for alias in node.names)


def part_of(name):
    """The part of fastmoe that a full name belongs to; None for another package or a name of `fastmoe` itself."""
    first, *rest = name.split(".")
    if first != "fastmoe" or not rest:
        return None
    on_disk = (PACKAGE / rest[0]).is_dir() or (PACKAGE / f"{rest[0]}.py").exists()
    return rest[0] if on_disk else "fastmoe"


def back_edges(part, names):
    for name in names:
        other = part_of(name)
        if other == "fastmoe":
            # A name such as fastmoe.MoE: that is the whole house, open to those above the core.
            if RANKS[part] < RANKS["parallel"]:
                yield name
        elif other is not None and other != part and RANKS[other] >= RANKS[part]:
            yield name


FILES = sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_one_way(path):
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    assert parts[0] in RANKS, f"{parts[0]} has no rank: give it one above"
    names = imported_modules(path.read_text(encoding="utf-8"), ["fastmoe", *parts[:-1]])
    assert not list(back_edges(parts[0], names))


@pytest.mark.parametrize(
    ("part", "source"),
    [
        ("kernels", "from fastmoe.routers import Router"),
        ("kernels", "def late():\n    import fastmoe.layer"),
        ("kernels", "from .. import layer"),
        ("routers", "from fastmoe.experts import MLPExperts"),
        ("monitor", "from fastmoe import layer"),
        ("layer", "from fastmoe import MoE"),
        ("convert", "from fastmoe.models import gpt"),
    ],
)
def test_a_back_edge_is_seen(part, source):
    assert list(back_edges(part, imported_modules(source, ["fastmoe", part])))


def modules_after(statement):
    code = f"import sys; {statement}; print(*sys.modules)"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(ran.stdout.split())


def test_import_brings_in_torch_alone():
    """No extra beyond what `import torch` itself brings, and few modules of any kind."""
    added = modules_after("import torch; import fastmoe") - modules_after("import torch")
    assert not {name for name in added if name.split(".")[0] in EXTRAS}
    ours = {name for name in added if name.split(".")[0] == "fastmoe"}
    assert "fastmoe.layer" in ours
    assert not {"fastmoe.train", "fastmoe.cli", "fastmoe.models", "fastmoe.bench", "fastmoe.tune"} & ours
    assert len(added - ours) < 30, sorted(added - ours)


def test_import_of_fmoe_brings_in_fastmoe_alone():
    added = modules_after("import torch; import fmoe, fmoe.gates, fmoe.functions") - modules_after("import torch")
    assert not {name for name in added if name.split(".")[0] in EXTRAS}
    others = {name for name in added if name.split(".")[0] not in ("fastmoe", "fmoe")}
    assert len(others) < 30, sorted(others)


def test_fastmoe_does_not_import_fmoe():
    for path in PACKAGE.rglob("*.py"):
        package = ["fastmoe", *path.relative_to(PACKAGE).parts[:-1]]
        names = imported_modules(path.read_text(encoding="utf-8"), package)
        assert not [name for name in names if name.split(".")[0] == "fmoe"], path


def test_everything_public_is_there():
    for name in fastmoe.__all__:
        assert getattr(fastmoe, name) is not None
