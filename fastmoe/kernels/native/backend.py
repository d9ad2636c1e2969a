"""The `native` backend."""

from typing import Any

from torch import Tensor

from fastmoe.kernels.native.library import load
from fastmoe.kernels.native.mlp import refusal
from fastmoe.kernels.torch_ops import TorchBackend


class NativeBackend(TorchBackend):
    """`plan`, and `expert_mlp` in float32 and bfloat16, on a CPU; the other kernels are the `torch` backend's."""

    name = "native"
    optional = True

    def available(self) -> str | None:
        library = load()
        return library if isinstance(library, str) else None

    def refuses(self, op: str, x: Tensor, *more: Any) -> str | None:
        if x.device.type != "cpu":
            return f"it runs on a CPU, tensors are on {x.device.type}"
        return refusal(x, more[1].shape[2]) if op == "expert_mlp" else None
