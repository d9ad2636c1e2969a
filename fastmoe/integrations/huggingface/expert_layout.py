"""The table of layouts in which checkpoints and models hold the experts of a MoE block."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fastmoe.integrations.huggingface.stacked import StackedExperts


@dataclass(frozen=True)
class ExpertLayout:
    """A row: what the tensors of a MoE block are called, and how the experts lie in them.

    Args:
        router: name of the router's matrix, (E, D) in every layout.
        first: names of the experts' first matrix: one, or two where gate and up lie apart. `{}` stands for the number
            of an expert; without it all experts lie in one tensor.
        second: name of the experts' second matrix.
        biases: names of the biases of both, in layouts that know any; as stacked tensors.
        gated: whether experts have a gate; None: both kinds.
        transposed: matrices are (E, in, out) instead of (E, out, in).
        alternating: outputs of gate and up take turns; otherwise all of the gate come first.
    """

    router: str
    first: tuple[str, ...]
    second: str
    biases: tuple[str, ...] = ()
    gated: bool | None = True
    transposed: bool = False
    alternating: bool = False

    @property
    def matrices(self) -> tuple[str, ...]:
        return (*self.first, self.second)

    @property
    def pattern(self) -> re.Pattern[str]:
        """Matches the full name of an expert's weight; its group is the block's name with the dot after it."""
        names = "|".join(re.escape(name).replace(r"\{\}", r"\d+") for name in (*self.matrices, *self.biases))
        return re.compile(rf"((?:.*\.)?)(?:{names})")

    def read(self, tensors: Mapping[str, Tensor], router_ED: Tensor) -> StackedExperts:
        """The experts of one block, from its tensors by their names inside it; `ValueError` if shapes do not fit."""
        first, second = (_stack(tensors, names, len(router_ED)) for names in (self.first, (self.second,)))
        experts = StackedExperts(first, second, *(tensors.get(name) for name in self.biases))
        experts = experts.transposed() if self.transposed else experts
        experts.check(router_ED, self.gated)
        return experts.halved() if self.alternating else experts

    def write(self, experts: StackedExperts) -> Iterator[tuple[str, Tensor]]:
        """The tensors of one block by their names inside it."""
        experts = experts.alternated() if self.alternating else experts
        experts = experts.transposed() if self.transposed else experts
        halves = experts.w1.chunk(len(self.first), dim=1)
        for name, stacked in zip(self.matrices, (*halves, experts.w2), strict=True):
            each = enumerate(stacked) if "{}" in name else [(0, stacked)]
            yield from ((name.format(number), tensor.contiguous()) for number, tensor in each)
        for name, bias in zip(self.biases, (experts.b1, experts.b2), strict=False):
            if bias is not None:
                yield name, bias


def _stack(tensors: Mapping[str, Tensor], names: tuple[str, ...], num_experts: int) -> Tensor:
    """One matrix of all experts, (E, ., .); of two names the first one's outputs come first."""
    if "{}" not in names[0]:
        parts, dims = {names[0]: tensors[names[0]]}, 3
    else:
        each = [name.format(number) for number in range(num_experts) for name in names]
        parts, dims = {name: tensors[name] for name in each}, 2
    first_name, first = next(iter(parts.items()))
    if first.dim() != dims:
        raise ValueError(f"{first_name} must have {dims} dimensions, got {tuple(first.shape)}")
    for name, part in parts.items():
        if (part.shape, part.dtype) != (first.shape, first.dtype):
            raise ValueError(
                f"experts must be alike: {first_name} is {tuple(first.shape)} {first.dtype}, "
                f"{name} is {tuple(part.shape)} {part.dtype}"
            )
    if dims == 3:
        return first
    return torch.stack(list(parts.values())).view(num_experts, len(names) * first.shape[0], first.shape[1])


GATE, UP, DOWN = (f"experts.{{}}.{name}_proj.weight" for name in ("gate", "up", "down"))
ALL_GATE_UP, ALL_UP, ALL_DOWN = (f"experts.{name}_proj" for name in ("gate_up", "up", "down"))
FUSED_BIASES = (f"{ALL_GATE_UP}_bias", f"{ALL_DOWN}_bias")
MIXTRAL = ("experts.{}.w1.weight", "experts.{}.w3.weight", "experts.{}.w2.weight")

LAYOUTS = {
    # fastmoe.MoE
    "fastmoe": ExpertLayout("router.proj.weight", ("experts.w1",), "experts.w2", ("experts.b1", "experts.b2"), None),
    # Mixtral on disk
    "mixtral-v4": ExpertLayout("gate.weight", MIXTRAL[:2], MIXTRAL[2]),
    # Qwen2-MoE, Qwen3-MoE, OLMoE, DeepSeek on disk; "plain", without a gate: NemotronH
    "per-expert": ExpertLayout("gate.weight", (GATE, UP), DOWN),
    "per-expert-plain": ExpertLayout("gate.weight", (UP,), DOWN, gated=False),
    # the same models in memory, since transformers 5
    "fused": ExpertLayout("gate.weight", (ALL_GATE_UP,), ALL_DOWN),
    "fused-plain": ExpertLayout("gate.weight", (ALL_UP,), ALL_DOWN, gated=False),
    # Aria
    "fused-transposed": ExpertLayout("router.weight", (ALL_GATE_UP,), ALL_DOWN, transposed=True),
    # GPT-OSS
    "gpt-oss": ExpertLayout("router.weight", (ALL_GATE_UP,), ALL_DOWN, FUSED_BIASES, transposed=True, alternating=True),
}
ROUTERS = sorted({layout.router for layout in LAYOUTS.values()})
