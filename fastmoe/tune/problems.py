"""Which products a layer's shape comes to."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from fastmoe.bench.presets import Shape
from fastmoe.kernels import get_activation
from fastmoe.kernels.triton.tiles import DECODE_ROWS, Problem

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

SHAPES: tuple[Shape, ...] = (
    (4096, 64, 1024, 4096, 2),  # the FastMoE paper's layer
    (8192, 8, 4096, 14336, 2),  # Mixtral 8x7B
    (8192, 128, 2048, 768, 8),  # Qwen3-30B-A3B
    (8192, 64, 2048, 1408, 6),  # fine-grained, as DeepSeek-V2-Lite
    (8192, 256, 1024, 512, 8),  # finer still
    *((tokens, 8, 4096, 14336, 2) for tokens in (1, 16, 64)),  # decoding
    *((tokens, 128, 2048, 768, 8) for tokens in (1, 4, 16)),
)
TOY_SHAPES: tuple[Shape, ...] = ((130, 3, 16, 32, 2), (2, 3, 16, 32, 2))
"""What Triton's interpreter is fit for."""


@dataclass(frozen=True)
class Case:
    """A product, and what of its layer the problem's key leaves out."""

    problem: Problem
    activation: str
    d_model: int
    top_k: int

    @property
    def num_tokens(self) -> int:
        return self.problem.num_rows // self.top_k

    @property
    def decode(self) -> bool:
        return self.problem.num_rows <= DECODE_ROWS


def cases(shapes: Sequence[Shape], dtypes: Sequence[str], activations: Sequence[str]) -> list[Case]:
    """The products of all these layers; of those with one row in the table, the first.

    Raises:
        ValueError: an unknown dtype or activation.
    """
    found: dict[str, Case] = {}
    for dtype in dtypes:
        if dtype not in DTYPES:
            raise ValueError(f"a dtype must be one of {', '.join(DTYPES)}; got {dtype!r}")
    for shape in shapes:
        for dtype in dtypes:
            for activation in activations:
                for case in _of_layer(shape, DTYPES[dtype], activation):
                    found.setdefault(case.problem.key, case)
    return list(found.values())


def _of_layer(shape: Shape, dtype: torch.dtype, activation: str) -> Iterator[Case]:
    """Forward, and backward but for decoding."""
    T, E, D, H, K = shape
    gated = get_activation(activation).gated
    W, N = H * (1 + gated), T * K
    products = [("forward", W, D), ("product", D, H)]
    if N > DECODE_ROWS:
        products += [("backward", D, H), ("weight", D, H), ("weight", W, D), ("turned", W, D)]
    for kind, outputs, inputs in products:
        problem = Problem(kind, dtype, N, E, outputs, inputs, gated and kind in ("forward", "backward"))
        yield Case(problem, activation, D, K)
