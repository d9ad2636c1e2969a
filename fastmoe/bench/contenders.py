"""The table of contenders."""

from collections.abc import Callable, Sequence
from functools import partial

from fastmoe._errors import unknown_name
from fastmoe.bench import huggingface, peers, plain
from fastmoe.bench.problem import Contender, Problem

OURS, DENSE, LAYER = "fastmoe", "dense MLP", "fastmoe layer"
Builder = Callable[[Problem], Contender]


def table() -> dict[str, Builder]:
    """Every contender by name."""
    return {
        OURS: plain.ours,
        **plain.each_backend(),
        "F.grouped_mm": plain.grouped_mm,
        "ModuleList loop": plain.module_list,
        "brute-force loop": plain.brute_force,
        DENSE: plain.dense,
        **{f"HF {name}": partial(huggingface.mixtral, implementation=name) for name in huggingface.IMPLEMENTATIONS},
        **peers.LAYERS,
    }


def choose(names: Sequence[str]) -> dict[str, Builder]:
    """The contenders of these names; all where there are none. Ours and the dense MLP, the floor's part, always run.

    Raises:
        ValueError: an unknown name.
    """
    known = table()
    for name in names:
        if name not in known:
            raise unknown_name("contender", name, known)
    wanted = {OURS, DENSE, *(names or known)}
    if wanted & set(peers.LAYERS):
        wanted.add(LAYER)
    return {name: builder for name, builder in known.items() if name in wanted}
