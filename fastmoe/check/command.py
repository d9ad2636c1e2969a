"""The command line of `fastmoe check-layout`."""

from __future__ import annotations

import argparse
import importlib
import math
import os
import shlex
import sys
import time
import traceback
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from fastmoe.check.check import check_layout
from fastmoe.check.demo import demo
from fastmoe.check.processes import end, join, world_size
from fastmoe.check.report import Report
from fastmoe.parallel.layout import DIMENSIONS

if TYPE_CHECKING:
    from fastmoe.check.problem import Answer, Factory

DESCRIPTION = """Whether a model trains on many processes as it does on one.

Trains it for three steps on the first process alone, then on the layout that is asked for, from the same weights and
batch, and compares outputs, loss, gradients, their norm, and the weights afterwards:

    torchrun --nproc-per-node 4 -m fastmoe check-layout --dp 2 --ep 2

The exit status is 0 if they agree, 1 if not, 2 if that cannot be found out."""
MODEL = """package.module:factory, called without arguments on each process, for (model, batch, loss): batch is a tensor
or a tuple of tensors with one row for each sample, model(batch[0]) the output, loss(output, *batch) a mean over the
rows; if none is given, a small model of fastmoe's own with every kind of experts"""


def main(arguments: Sequence[str]) -> int:
    """Run the command; 0: the layouts agree; 1: they do not; 2: that cannot be found out.

    Among other processes it ends this one, see `fastmoe.check.processes.end`.
    """
    given = _parser().parse_args(arguments)
    status = 2
    try:
        _check_sizes(given, arguments)
        report = _check(given, join(given.device))
        if dist.get_rank() == 0:
            print(report.table(given.verbose), flush=True)
        dist.barrier()
        status = 0 if report.passed else 2 if report.random else 1
    except ValueError as error:
        _say(error)
    except Exception:
        traceback.print_exc()
    end(status)
    return status


def _say(error: ValueError) -> None:
    """Once on each machine."""
    if os.environ.get("LOCAL_RANK", "0") == "0":
        print(f"fastmoe check-layout: {error}", file=sys.stderr)
    else:
        time.sleep(1)  # as soon as one process ends, torchrun ends all: let the one that prints do so


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="fastmoe check-layout", description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dp", type=int, default=1, metavar="N", help="processes with other tokens")
    parser.add_argument("--ep", type=int, default=1, metavar="N", help="processes with other tokens and other experts")
    parser.add_argument("--tp", type=int, default=1, metavar="N", help="processes with the same tokens")
    parser.add_argument("--tp-mode", choices=("hidden", "slice"), default="hidden", help="what those along tp divide")
    parser.add_argument("--engine", choices=("ddp", "fsdp"), default="ddp", help="what keeps replicas alike")
    parser.add_argument("--chunks", type=int, default=1, metavar="N", help="parts in which tokens are exchanged")
    parser.add_argument("--suppress-duplicates", action="store_true", help="a token travels once to each process")
    parser.add_argument("--model", metavar="MODULE:FACTORY", help=MODEL)
    parser.add_argument("--dtype", choices=("float64", "float32"), default="float64")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--tolerance", type=float, metavar="X", help="relative; 1e-10 in float64, 1e-4 in float32")
    parser.add_argument("--verbose", action="store_true", help="show every tensor")
    return parser


def _check_sizes(given: argparse.Namespace, arguments: Sequence[str]) -> None:
    sizes = {name: getattr(given, name) for name in DIMENSIONS}
    if min(sizes.values()) < 1:
        raise ValueError(f"dp, ep and tp must be at least 1, got {sizes}")
    needed, there = math.prod(sizes.values()), world_size()
    if needed == there:
        return
    product = " x ".join(f"{name}={size}" for name, size in sizes.items())
    raise ValueError(
        f"{product} is {needed} processes, and there {'is' if there == 1 else 'are'} {there}: start them by\n\n"
        f"    torchrun --nproc-per-node {needed} -m fastmoe check-layout {shlex.join(arguments)}\n"
    )


def _check(given: argparse.Namespace, device: torch.device) -> Report:
    names = DIMENSIONS if given.tp > 1 else DIMENSIONS[:2]
    mesh = init_device_mesh(device.type, tuple(getattr(given, name) for name in names), mesh_dim_names=names)
    return check_layout(
        _demo_for(given) if given.model is None else partial(_call, given.model),
        mesh,
        engine=given.engine,
        tp=given.tp_mode,
        chunks=given.chunks,
        suppress_duplicates=given.suppress_duplicates,
        dtype=getattr(torch, given.dtype),
        tolerance=given.tolerance,
    )


def _demo_for(given: argparse.Namespace) -> Factory:
    """With more experts than processes, and fewer on the last."""
    hidden = given.tp_mode == "hidden"
    spread_over = given.ep * (1 if hidden else given.tp)
    return partial(demo, 2 * spread_over + 1, 4 * given.dp * given.ep, module_experts=not hidden or given.tp == 1)


def _call(name: str) -> Answer:
    """Call the factory of a name; also one of the current folder.

    Raises:
        ValueError: there is none.
    """
    module, _, factory = name.partition(":")
    if not module or not factory:
        raise ValueError(f"--model must be package.module:factory, got {name!r}")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        found = importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module}.".startswith(f"{error.name}."):
            raise
        raise ValueError(f"--model {name}: there is no module {error.name!r}, neither installed nor here") from error
    if not callable(made := getattr(found, factory, None)):
        raise ValueError(f"--model {name}: module {module!r} has no function {factory!r}")
    return made()
