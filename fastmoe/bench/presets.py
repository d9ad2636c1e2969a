"""What each preset runs."""

import dataclasses
import re

from fastmoe.bench import huggingface
from fastmoe.bench.contenders import CAPTURED
from fastmoe.bench.graphs import in_graph_name

Shape = tuple[int, int, int, int, int]


@dataclasses.dataclass(frozen=True)
class Preset:
    """Shapes (T, E, D, H, K) that are trained, and shapes of decoding, forward alone."""

    shapes: tuple[Shape, ...]
    dtypes: tuple[str, ...]
    activations: tuple[str, ...]
    decode: tuple[Shape, ...] = ()
    contenders: tuple[str, ...] = ()
    device: str = "cpu"


_HUGGING_FACE = Preset(
    shapes=(
        *((tokens, 64, 512, 1024, 2) for tokens in (1, 16, 256, 2048)),
        (16, 256, 256, 512, 2),
        (1024, 256, 256, 512, 2),
    ),
    dtypes=("float32", "bfloat16"),
    activations=("swiglu",),
    contenders=huggingface.NAMES,
)

PRESETS = {
    "cpu": Preset(
        shapes=(
            (2048, 8, 512, 1024, 2),
            (8192, 8, 1024, 4096, 2),
            (2048, 64, 512, 1024, 2),
            (1024, 256, 256, 512, 2),
            (4096, 512, 64, 128, 2),
        ),
        decode=tuple((tokens, 64, 1024, 2048, 2) for tokens in (1, 4, 16, 64)),
        dtypes=("float32", "bfloat16"),
        activations=("gelu", "swiglu"),
    ),
    "hf": _HUGGING_FACE,
    "gpu-hf": dataclasses.replace(_HUGGING_FACE, device="cuda"),
    "gpu-large": Preset(
        shapes=((32768, 128, 4096, 1024, 8), (32768, 128, 2048, 768, 8)),
        dtypes=("bfloat16",),
        activations=("swiglu",),
        contenders=("F.grouped_mm", "HF grouped_mm"),
        device="cuda",
    ),
    "gpu-decode": Preset(
        shapes=(),
        decode=tuple((tokens, 128, 2048, 768, 8) for tokens in (1, 2, 4, 8, 16, 32, 64)),  # Qwen3-30B-A3B's experts
        dtypes=("bfloat16",),
        activations=("swiglu",),
        contenders=("F.grouped_mm", "HF grouped_mm", "HF batched_mm", *map(in_graph_name, CAPTURED)),
        device="cuda",
    ),
    "gpu-dense": Preset(
        shapes=((16384, 8, 2048, 4096, 2), (16384, 64, 2048, 4096, 2)),
        dtypes=("bfloat16",),
        activations=("gelu", "swiglu"),
        contenders=("F.grouped_mm",),
        device="cuda",
    ),
    "gpu-paper": Preset(
        shapes=tuple(
            (4096, experts, 1024, 4096, min(2, experts)) for experts in (64, 512, 8, 1, 2, 4, 16, 32)
        ),  # those with a target first
        dtypes=("bfloat16", "float32"),
        activations=("relu",),
        contenders=("F.grouped_mm", "ModuleList loop", "brute-force loop"),
        device="cuda",
    ),
    "fastmoe-paper": Preset(
        shapes=tuple((4096, experts, 1024, 4096, 2) for experts in (2, 4, 8, 16, 32, 64)),
        dtypes=("float32",),
        activations=("gelu",),
        contenders=("F.grouped_mm", "ModuleList loop", "brute-force loop"),
    ),
}


def toy(preset: Preset) -> Preset:
    """The same with tiny shapes on a CPU, for a rehearsal; our Triton kernels take part, through Triton's interpreter.

    bfloat16 becomes float16: the interpreter's products in bfloat16 are wrong.
    """

    def tiny(shapes: tuple[Shape, ...]) -> tuple[Shape, ...]:
        return tuple(dict.fromkeys((min(T, 8), min(E, 4), 32, 48, min(K, 2)) for T, E, _, _, K in shapes))

    return dataclasses.replace(
        preset,
        shapes=tiny(preset.shapes),
        decode=tiny(preset.decode),
        dtypes=tuple("float16" if dtype == "bfloat16" else dtype for dtype in preset.dtypes),
        contenders=(*preset.contenders, "fastmoe (triton)"),
        device="cpu",
    )


def parse_shape(text: str) -> Shape:
    """`2048x8x512x1024x2` as (T, E, D, H, K).

    Raises:
        ValueError: anything else, or more experts chosen than there are.
    """
    if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*){4}", text):
        raise ValueError(f"a shape must be TxExDxHxK, five positive numbers, as 2048x8x512x1024x2; got {text!r}")
    T, E, D, H, K = map(int, text.split("x"))
    if K > E:
        raise ValueError(f"a shape's K must be at most its E, got {text!r}")
    return T, E, D, H, K
