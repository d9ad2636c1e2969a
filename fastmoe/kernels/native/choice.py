"""Where PyTorch's own products are faster; benchmarks/choose_cpu.py measures it into results/choose_cpu.json."""

import torch

_ROWS_PER_EXPERT = 256
_MATRIX_SIZE = 512 * 1024


def hands_over(dtype: torch.dtype, num_rows: int, num_experts: int, d_model: int, d_hidden: int) -> bool:
    """Whether the native backend leaves a call to the torch backend: large float32 products, one after the other.

    By sizes alone, so that a pass and its backward agree.
    """
    large = num_rows >= _ROWS_PER_EXPERT * num_experts and d_model * d_hidden >= _MATRIX_SIZE
    return dtype == torch.float32 and large
