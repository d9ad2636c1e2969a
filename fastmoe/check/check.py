"""`check_layout`: the same training on one process and on a mesh, and how far apart they are."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from fastmoe._errors import check_int, check_number
from fastmoe.check.compare import compare
from fastmoe.check.problem import Factory, Problem, build
from fastmoe.check.reference import refer
from fastmoe.check.report import Report
from fastmoe.check.training import train
from fastmoe.parallel.checkpoint_together import Together
from fastmoe.parallel.layout import Layout, processes_of
from fastmoe.parallel.parallelize import parallelize

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

TOLERANCES = {torch.float64: 1e-10, torch.float32: 1e-4}


def check_layout(
    factory: Factory,
    mesh: DeviceMesh,
    *,
    engine: str = "ddp",
    tp: str = "hidden",
    chunks: int = 1,
    suppress_duplicates: bool = False,
    dtype: torch.dtype = torch.float64,
    tolerance: float | None = None,
    seed: int = 0,
) -> Report:
    """Train a model for three steps on one process and on a mesh, from the same weights and batch, and compare.

    Each step clips the gradient norm to half of the first one, and updates by AdamW. The first process runs the
    reference, with the whole model and batch, while the others wait; it runs it twice, to see whether training draws
    random numbers. All processes of the default group call it.

    ```
    report = fastmoe.check.check_layout(factory, init_device_mesh("cuda", (2, 4), mesh_dim_names=("dp", "ep")))
    assert report.passed, report
    ```

    Args:
        factory: called on each process, after `torch.manual_seed`; returns `(model, batch, loss)`. `batch` is a tensor
            or a tuple of tensors, with the rows of the whole batch as first dimension; `model(batch[0])` returns a
            tensor with the same rows, or a structure of such; `loss(output, *batch)` is a mean over the rows.
        mesh: of all processes; see `fastmoe.parallelize`. Those along dp and ep get equal shares of the batch.
        engine, tp, chunks, suppress_duplicates: see `fastmoe.parallelize`.
        dtype: what model and batch are converted to. In float32 two experts may be so close to each other that
            rounding decides between them.
        tolerance: the greatest relative difference that passes; 1e-10 in float64, 1e-4 in float32 unless given.
        seed: of the factory's random numbers.

    Raises:
        ValueError: on every process: an argument, a model or a batch that does not fit; names what was expected.
    """
    layout, together = Layout(mesh, tp), Together.everyone()
    if mesh.size() != together.size:
        raise ValueError(f"the mesh must have all {together.size} processes, it is of {layout}")
    tolerance, device = _tolerance(dtype, tolerance), _device(mesh)
    shares = processes_of(layout.over("dp", "ep"))
    make = partial(build, factory, check_int("seed", seed, 0), dtype)
    problem = together.each(make).on(device)
    _agree_on_batch(problem, layout, together)
    parallelize(problem.model, mesh, engine=engine, tp=tp, chunks=chunks, suppress_duplicates=suppress_duplicates)
    group = dist.new_group([0])
    rounding = max(tolerance, TOLERANCES[dtype])
    reference = together.each(
        lambda: refer(make, problem, device, group, shares.size, rounding) if together.is_first else None
    )
    told = together.all(None if reference is None else (reference.known, reference.settings))[0]
    assert told is not None
    known, settings = told
    dist.destroy_process_group(group)
    torch.seed()
    record = train(problem, shares, settings)
    differences = compare(record, None if reference is None else reference.record, known, device)
    options = [f"tp {tp}"] * (layout.size("tp") > 1) + [f"{chunks} chunks"] * (chunks > 1)
    options += ["duplicates suppressed"] * suppress_duplicates
    title = ", ".join([str(layout), engine, *options, str(dtype).removeprefix("torch."), device.type])
    return Report(title, tolerance, tuple(differences))


def _tolerance(dtype: torch.dtype, given: float | None) -> float:
    if dtype not in TOLERANCES:
        raise ValueError(f"dtype must be float64 or float32, got {dtype}")
    return TOLERANCES[dtype] if given is None else check_number("tolerance", given)


def _device(mesh: DeviceMesh) -> torch.device:
    kind = mesh.device_type
    return torch.device(kind, torch.cuda.current_device()) if kind == "cuda" else torch.device(kind)


def _agree_on_batch(problem: Problem, layout: Layout, together: Together) -> None:
    """The first process's batch to all."""
    forms = together.all([(tuple(t.shape), t.dtype) for t in problem.batch])
    for rank, form in enumerate(forms):
        if form != forms[0]:
            raise ValueError(
                f"the factory must return the same batch on every process; process 0 has {forms[0]}, process {rank} "
                f"{form}"
            )
    shares = layout.size("dp") * layout.size("ep")
    if not problem.rows or problem.rows % shares:
        raise ValueError(
            f"the batch must divide into {shares} equal shares, one for each process along dp and ep ({layout}); "
            f"it has {problem.rows} rows"
        )
    for tensor in problem.batch:
        dist.broadcast(tensor, 0)
