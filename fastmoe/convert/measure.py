"""Finding out what a block computes by running its twin, so that nothing is taken on trust from its names.

The formula that agrees with the twin in eval and in training mode says which activation the block has and where its
dropouts stand. For the second, each dropout of the twin becomes a probe that scales features in a way of its own.
"""

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastmoe.convert.projection import Parts
from fastmoe.convert.twin import agree, make_rows, run, twin_of, undisturbed
from fastmoe.kernels.activations import ACTIVATIONS

Function = Callable[[Tensor], Tensor]
PLAIN = {name: row.forward for name, row in ACTIVATIONS.items() if not row.gated}
GATED = {name: row.forward for name, row in ACTIVATIONS.items() if row.gated}


@dataclass(frozen=True)
class Form:
    """What was measured: the activation, by name where `fastmoe.MoE` knows it, and the dropouts in their places."""

    activation: str | Function
    dropout: nn.Dropout | None
    output_dropout: nn.Dropout | None


@dataclass(frozen=True)
class Formula:
    """`output_dropout(down(dropout(activation(up(x)))))`; with a gate `activation(gate(x)) * up(x)` inside."""

    parts: Parts

    def __call__(self, x_TD: Tensor, activation: Function, dropout: Function, output_dropout: Function) -> Tensor:
        # In two lots, so that an activation that mixes rows shows.
        return torch.cat([output_dropout(self._rows(x, activation, dropout)) for x in x_TD.chunk(2)])

    def _rows(self, x_TD: Tensor, activation: Function, dropout: Function) -> Tensor:
        up, down, gate = self.parts.up, self.parts.down, self.parts.gate
        h_TH = F.linear(x_TD, up.weight, up.bias)
        h_TH = activation(h_TH) if gate is None else activation(F.linear(x_TD, gate.weight, gate.bias)) * h_TH
        return F.linear(dropout(h_TH), down.weight, down.bias)


class _Probe(nn.Dropout):
    """Scales each feature by a number of its own, for the output to tell where this dropout stands."""

    frequency: int

    def forward(self, input: Tensor) -> Tensor:
        positions = torch.arange(1, input.shape[-1] + 1, dtype=input.dtype, device="cpu")
        return input * (1 + 0.5 * torch.cos(self.frequency * positions))


def relu_squared(x: Tensor) -> Tensor:
    """`relu(x) ** 2` (So et al. 2021, Primer, 2109.08668)."""
    return F.relu(x).square()


def known_name(activation: Function) -> str | None:
    """The name of the built-in activation that `activation` equals on [-64, 64], else None."""
    x = torch.linspace(-64, 64, 4097, dtype=torch.float64, device="cpu")[:, None]
    with undisturbed():
        try:
            y = copy.deepcopy(activation)(x)
        except Exception:
            return None
        return next((name for name, known in PLAIN.items() if agree(y, known(x))), None)


def measure(block: nn.Module, parts_of: Callable[[nn.Module], Parts]) -> Form | None:
    """The form of `block`, whose projections `parts_of` finds; None when no form gives its outputs."""
    with undisturbed():
        twin = twin_of(block)
        if twin is None:
            return None
        formula = Formula(parts_of(twin))
        x_TD = make_rows(formula.parts.up.weight.shape[1])
        activation = _find_activation(block, twin, formula, x_TD)
        if activation is None:
            return None
        places = _find_dropouts(twin, partial(formula, x_TD, activation[1]), x_TD)
    if places is None:
        return None
    dropout, output_dropout = (None if name is None else cast(nn.Dropout, block.get_submodule(name)) for name in places)
    return Form(activation[0], dropout, output_dropout)


def _find_activation(
    block: nn.Module, twin: nn.Module, formula: Formula, x_TD: Tensor
) -> tuple[str | Function, Function] | None:
    """The activation, as `fastmoe.MoE` takes it and as the formula calls it."""
    y_TD = run(twin.eval(), x_TD)
    if y_TD is None:
        return None
    for activation, call in _candidates(block, twin, gated=formula.parts.gate is not None):
        try:
            expected = formula(x_TD, call, _identity, _identity)
        except Exception:
            continue
        if agree(y_TD, expected):
            return activation, call
    return None


def _candidates(block: nn.Module, twin: nn.Module, gated: bool) -> Iterator[tuple[str | Function, Function]]:
    if gated:
        yield from GATED.items()
        return
    yield from PLAIN.items()
    yield relu_squared, relu_squared
    for name, child in twin.named_children():
        if not isinstance(child, nn.Dropout) and next(child.parameters(), None) is None:
            yield block.get_submodule(name), child
    yield from ((value, value) for name, value in vars(twin).items() if "act" in name and callable(value))


def _find_dropouts(
    twin: nn.Module, formula: Callable[[Function, Function], Tensor], x_TD: Tensor
) -> tuple[str | None, str | None] | None:
    """The names of the inner and the output dropout; None if one stands elsewhere or is no `nn.Dropout`."""
    probes = {name: module for name, module in twin.named_modules() if type(module) is nn.Dropout}
    for frequency, module in enumerate(probes.values(), start=1):
        module.__class__ = _Probe
        vars(module)["frequency"] = frequency
    y_TD = run(twin.train(), x_TD)
    if y_TD is None:
        return None
    places: dict[str | None, Function] = {None: _identity, **probes}
    for inner, output in product(places, places):
        if agree(y_TD, formula(places[inner], places[output])):
            return inner, output
    return None


def _identity(x: Tensor) -> Tensor:
    return x
