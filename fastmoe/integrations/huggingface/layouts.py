"""State dicts of MoE models, from one layout of the experts' weights to another."""

from collections import Counter
from collections.abc import Mapping

import torch
from torch import Tensor

from fastmoe._errors import check_choice
from fastmoe.integrations.huggingface.expert_layout import LAYOUTS, ROUTERS, ExpertLayout

__all__ = ["LAYOUTS", "ExpertLayout", "convert_state_dict"]

NAMED_IN_ERRORS = 6


@torch.no_grad()
def convert_state_dict(
    state: Mapping[str, Tensor], source: str, target: str, *, block: str | None = None, router: str | None = None
) -> dict[str, Tensor]:
    """The same weights in another layout of the experts; what belongs to no MoE block passes as it is.

    Values are moved, never computed: a conversion and its way back give the same bits. `state` is left alone. A tensor
    that both layouts store alike is handed on, not copied, and an expert's slice of a stacked tensor is a view.

    Args:
        state: tensors by name, of a whole model or of one block.
        source, target: names in `fastmoe.integrations.huggingface.layouts.LAYOUTS`.
        block: what MoE blocks are called in the result, such as "block_sparse_moe"; None: as in `state`.
        router: what the router's matrix is called inside a block of the result; None: as usual in `target`.

    Raises:
        ValueError: an unknown layout; no experts in the layout `source`; a missing expert, or a part of one; shapes or
            dtypes that do not fit together; weights that `target` has no place for.
    """
    old = LAYOUTS[check_choice("source", source, LAYOUTS)]
    new = LAYOUTS[check_choice("target", target, LAYOUTS)]
    prefixes = _blocks(state, old)
    if not prefixes:
        raise ValueError(f"found no experts in the layout {source!r}: no name ends in {_listed(old.matrices)}")
    result: list[tuple[str, Tensor]] = []
    passing = dict(state)
    for prefix in prefixes:
        inside = {name.removeprefix(prefix): passing.pop(name) for name in list(passing) if name.startswith(prefix)}
        try:
            tensors = _convert_block(inside, old, new, router or new.router)
        except ValueError as error:
            where = f"block {prefix[:-1]!r}, " if prefix else ""
            raise ValueError(f"{where}from {source!r} to {target!r}: {error}") from None
        place = prefix if block is None else f"{_parent(prefix)}{block}."
        result += [(place + name, tensor) for name, tensor in tensors]
    result += passing.items()
    twice = [name for name, count in Counter(name for name, _ in result).items() if count > 1]
    if twice:
        raise ValueError(f"the result would hold two tensors by the name {_listed(twice)}")
    return dict(result)


def _blocks(state: Mapping[str, Tensor], layout: ExpertLayout) -> list[str]:
    """What the names of each block's tensors begin with; `ValueError` for a block with nothing but a router."""
    found = (layout.pattern.fullmatch(name) for name in state)
    prefixes = list(dict.fromkeys(match[1] for match in found if match))
    names = {prefix.removeprefix(_parent(prefix)) for prefix in prefixes}
    for tensor_name in state:
        for router in ROUTERS:
            prefix = tensor_name.removesuffix(router)
            like_a_block = prefix != tensor_name and prefix.removeprefix(_parent(prefix)) in names
            if like_a_block and prefix not in prefixes:
                raise ValueError(f"block {prefix[:-1]!r} has a router, {router}, and no experts")
    return prefixes


def _parent(prefix: str) -> str:
    """Of "model.layers.0.mlp." the part "model.layers.0."."""
    head, dot, _ = prefix[:-1].rpartition(".")
    return head + dot


def _convert_block(
    inside: dict[str, Tensor], old: ExpertLayout, new: ExpertLayout, new_router: str
) -> list[tuple[str, Tensor]]:
    routers = [name for name in ROUTERS if name in inside]
    if len(routers) != 1 or inside[routers[0]].dim() != 2:
        raise ValueError(f"expected one router's matrix (E, D), by one of the names {_listed(ROUTERS)}")
    router = inside.pop(routers[0])
    weights = _take_weights(inside, old, len(router))
    experts = old.read(weights, router)
    if new.gated not in (None, experts.gated):
        raise ValueError(f"the experts have {'a' if experts.gated else 'no'} gate, those of the target the opposite")
    if experts.b1 is not None and not new.biases:
        raise ValueError(f"the target has no place for the experts' biases {_listed(old.biases)}")
    _check_rest(inside, routers[0], new_router)
    return [(new_router, router), *new.write(experts), *inside.items()]


def _take_weights(inside: dict[str, Tensor], layout: ExpertLayout, num_experts: int) -> dict[str, Tensor]:
    """The experts' tensors, taken out of `inside`; `ValueError` unless all are there."""
    templates = list(layout.matrices)
    if any(name in inside for name in layout.biases):
        templates += layout.biases
    names = {template: [template.format(number) for number in range(num_experts)] for template in templates}
    missing = [name for same in names.values() for name in dict.fromkeys(same) if name not in inside]
    if missing:
        raise ValueError(f"the router is of {num_experts} experts, and these weights are missing: {_listed(missing)}")
    return {name: inside.pop(name) for same in names.values() for name in dict.fromkeys(same)}


def _check_rest(inside: dict[str, Tensor], old_router: str, new_router: str) -> None:
    """`ValueError` if what is left would lose its meaning: more of the experts, or of a router that is renamed."""
    lost = ["experts."]
    if old_router != new_router:
        lost.append(old_router.partition(".")[0] + ".")
    left = [name for name in inside if name.startswith(tuple(lost))]
    if left:
        raise ValueError(f"there is no place in the target for {_listed(left)}")


def _listed(names: list[str] | tuple[str, ...]) -> str:
    rest = len(names) - NAMED_IN_ERRORS
    return ", ".join(names[:NAMED_IN_ERRORS]) + (f" and {rest} more" if rest > 0 else "")
