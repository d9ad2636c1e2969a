"""What each preset runs."""

import dataclasses
import re

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
    "gpu": Preset(
        shapes=(
            (8192, 64, 1024, 4096, 2),
            (4096, 64, 512, 1024, 2),
            (16384, 8, 2048, 8192, 2),
            (8192, 256, 1024, 512, 8),
        ),
        dtypes=("bfloat16", "float16"),
        activations=("gelu", "swiglu"),
        device="cuda",
    ),
    "fastmoe-paper": Preset(
        shapes=tuple((4096, experts, 1024, 4096, 2) for experts in (2, 4, 8, 16, 32, 64)),
        dtypes=("float32",),
        activations=("gelu",),
        contenders=("F.grouped_mm", "ModuleList loop", "brute-force loop"),
    ),
}


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
