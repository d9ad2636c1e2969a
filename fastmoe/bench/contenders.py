"""The table of contenders."""

from collections.abc import Callable, Sequence
from functools import partial

from fastmoe._errors import unknown_name
from fastmoe.bench import huggingface, peers, plain
from fastmoe.bench.graphs import in_graph, in_graph_name
from fastmoe.bench.problem import Contender, Problem

OURS, DENSE, LAYER = "fastmoe", "dense MLP", "fastmoe layer"
CAPTURED = (OURS, "F.grouped_mm", "HF grouped_mm", "HF batched_mm")
Builder = Callable[[Problem], Contender]


def table() -> dict[str, Builder]:
    """Every contender by name."""
    eager: dict[str, Builder] = {
        OURS: plain.ours,
        **plain.each_backend(),
        "F.grouped_mm": plain.grouped_mm,
        "ModuleList loop": plain.module_list,
        "brute-force loop": plain.brute_force,
        DENSE: plain.dense,
        **{
            huggingface.named(name): partial(huggingface.mixtral, implementation=name)
            for name in huggingface.IMPLEMENTATIONS
        },
        **peers.LAYERS,
    }
    return eager | {in_graph_name(name): in_graph(eager[name]) for name in CAPTURED}


def choose(names: Sequence[str]) -> dict[str, Builder]:
    """The contenders of these names; where there are none, all but CUDA graphs.

    Ours and the dense MLP, the floor's part, always run.

    Raises:
        ValueError: an unknown name.
    """
    known = table()
    for name in names:
        if name not in known:
            raise unknown_name("contender", name, known)
    graphs = {in_graph_name(name) for name in CAPTURED}
    wanted = {OURS, DENSE, *(names or known.keys() - graphs)}
    if wanted & set(peers.LAYERS):
        wanted.add(LAYER)
    return {name: builder for name, builder in known.items() if name in wanted}
