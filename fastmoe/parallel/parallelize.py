"""`parallelize`: data and expert parallelism over a DeviceMesh, in one call."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import nn

from fastmoe._errors import check_int
from fastmoe.experts import local
from fastmoe.model import moe_layers
from fastmoe.parallel.agree import check_agreement
from fastmoe.parallel.checks import check_engine, check_sharing
from fastmoe.parallel.engines import Parallel, broadcast, find_parallel, parameters_of, use_ddp, use_fsdp
from fastmoe.parallel.layout import Layout
from fastmoe.parallel.shard import check_layer, shard_layer

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


def parallelize(
    model: nn.Module,
    mesh: DeviceMesh,
    *,
    engine: str = "ddp",
    tp: str = "hidden",
    chunks: int = 1,
    suppress_duplicates: bool = False,
    blocks: Sequence[type[nn.Module]] = (),
    **engine_options: Any,
) -> nn.Module:
    """Spread a model over processes, in place: other experts on each along ep, other tokens on each along dp and ep.

    Afterwards train it as on one process: call the model, `loss.backward()`, `fastmoe.clip_grad_norm_`, any optimizer
    made from its parameters now. The objective is the mean of all processes' losses, as with
    `DistributedDataParallel`; gradients, balance losses, capacities and statistics are those of the whole batch, the
    same on any layout. Each process must call the model equally often, also where it has no tokens.

    ```
    mesh = init_device_mesh("cuda", (dp, ep), mesh_dim_names=("dp", "ep"))
    fastmoe.parallelize(model, mesh)
    optimizer = torch.optim.AdamW(model.parameters())
    ```

    Args:
        model: with `fastmoe.MoE` layers, on its device, or on the meta device; see `fastmoe.materialize`. Values become
            those of the first process, of experts those of the first of their replicas.
        mesh: dimensions named from dp, ep and tp, in this order, each of which may be absent. ep need not divide the
            number of experts E: each process holds `ceil(E / ep)` of them as long as they last.
        engine: "ddp": `DistributedDataParallel`; "fsdp": `fully_shard`, the dense parameters over all processes, the
            experts over those that hold the same ones; their parameters are then DTensors.
        tp: what the processes along tp do, which hold the same tokens and dense parameters. "hidden": each holds a
            part of every expert's hidden width. "slice": each routes a slice of the tokens, and experts are spread
            over ep and tp. Only with engine "ddp".
        chunks: tokens are exchanged in so many parts, one while another is computed.
        suppress_duplicates: a token travels once to a process where it has several experts.
        blocks: with engine "fsdp", classes whose modules are sharded one by one, as a Transformer's blocks should be.
        engine_options: for `DistributedDataParallel` or `fully_shard`.

    Returns:
        The same model.

    Raises:
        ValueError: an argument that does not fit, a model that is parallel already, or processes that differ in model
            or arguments; names the difference.
    """
    layout = Layout(mesh, tp)
    options = {
        "engine": engine,
        "tp": tp,
        "chunks": chunks,
        "suppress_duplicates": suppress_duplicates,
        "blocks": [block.__name__ for block in blocks],
        "engine_options": engine_options,
    }
    check_agreement(model, layout, options)
    check_int("chunks", chunks, 1)
    if find_parallel(model) is not None:
        raise ValueError(f"{type(model).__name__} is parallel already")
    check_engine(model, layout, engine, blocks, engine_options)
    check_sharing(model, layout)
    for name, layer in moe_layers(model).items():
        check_layer(layer, layout, name)
    parallel = Parallel(layout, engine)
    for name, layer in moe_layers(model).items():
        shard_layer(
            layer,
            layout,
            name=name,
            chunks=chunks,
            suppress_duplicates=suppress_duplicates,
            as_dtensors=engine == "fsdp",
        )
    _start_alike(model, layout)
    if engine == "fsdp":
        use_fsdp(model, parallel, blocks, engine_options)
    else:
        use_ddp(model, parallel, engine_options)
    model.fastmoe_parallel = parallel  # type: ignore[assignment]
    return model


def _start_alike(model: nn.Module, layout: Layout) -> None:
    everyone = layout.everyone
    broadcast(parameters_of(model, experts=False), everyone)
    broadcast(map(local, parameters_of(model, experts=True)), layout.replicas)
    routed = {b for layer in moe_layers(model).values() for b in layer.experts.buffers()}
    broadcast([b for b in model.buffers() if b not in routed], everyone)
    broadcast([b for b in model.buffers() if b in routed], layout.replicas)
