"""The `triton` backend."""

import importlib.util
import os
from functools import cache
from typing import Any

import torch
from torch import Tensor

from fastmoe.kernels.contract import Plan
from fastmoe.kernels.torch_ops import TorchBackend
from fastmoe.kernels.triton import ops

_MAX_EXPERTS = 4096
_MAX_NUMBERS = 2**31 - 1  # places in one matrix are int32
_MAX_SCORED, _MAX_K = 1024, 16  # as in score.py, which imports Triton
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class TritonBackend(TorchBackend):
    """Every kernel, on a GPU of compute capability 8.0 or AMD's; on a CPU through Triton's interpreter, for tests."""

    name = "triton"

    def available(self) -> str | None:
        if importlib.util.find_spec("triton") is None:
            return "Triton is not installed"
        return None if _interpreting() else _gpu_is_too_old()

    def refuses(self, op: str, x: Tensor, *more: Any) -> str | None:
        if x.device.type != "cuda" and not (x.device.type == "cpu" and _interpreting()):
            return f"it runs on a GPU, tensors are on {x.device.type}"
        if op == "plan":
            return _above("experts", more[0], _MAX_EXPERTS)
        if op == "score_topk":
            return (
                _above("experts", x.shape[1], _MAX_SCORED) or _above("experts chosen", more[0], _MAX_K) or _float32(x)
            )
        if x.dtype not in _DTYPES:
            return f"it knows float32, bfloat16 and float16, got {x.dtype}"
        weights = more if op in ("grouped_mm", "expert_mlp") else ()
        largest = max([0, *(w.shape[1] * w.shape[2] for w in weights)])  # torch.compile knows no max of a generator
        return _above("numbers in an expert's matrix", largest, _MAX_NUMBERS)

    def combine(self, rows_NO: Tensor, token_ids_N: Tensor, weights_N: Tensor, plan: Plan, num_tokens: int) -> Tensor:
        return ops.combine(rows_NO, weights_N, token_ids_N, plan.order_N, plan.offsets_E, num_tokens)

    def score_topk(
        self, logits_TE: Tensor, top_k: int, score_function: str, normalize: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        return ops.score_topk(logits_TE, top_k, score_function == "softmax", normalize)


def _above(what: str, number: int, most: int) -> str | None:
    return f"it takes up to {most} {what}, got {number}" if number > most else None


def _float32(x: Tensor) -> str | None:
    return None if x.dtype == torch.float32 else f"it knows float32, got {x.dtype}"


def _interpreting() -> bool:
    """Triton's own switch, read when its kernels are first imported."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@cache
def _gpu_is_too_old() -> str | None:
    if not torch.cuda.is_available():
        return "there is no CUDA or ROCm device"
    capabilities = [torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())]
    if torch.version.hip is None and min(capabilities) < (8, 0):
        return f"it needs compute capability 8.0, the GPU has {'.'.join(map(str, min(capabilities)))}"
    return None
