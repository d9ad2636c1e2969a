"""`FMoELinear`: one linear layer per expert, on rows grouped by expert."""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastmoe import kernels
from fastmoe._errors import check_int


class MOELinear:
    """The product alone."""

    @staticmethod
    def apply(global_input_buf: Tensor, fwd_expert_count: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """`FMoELinear.forward` with weights `(e, O, I)` and biases `(e, O)` of one's own."""
        offsets_e = fwd_expert_count.cumsum(0).to(global_input_buf.device, torch.int32)
        return kernels.grouped_mm(global_input_buf, weight, offsets_e, bias)


class FMoELinear(nn.Module):
    """`rows @ weight[e].T + bias[e]` for each expert's rows.

    Args:
        num_expert: e, experts in this worker.
        in_feat, out_feat: I, O.
        bias: whether there is one; it starts at zero, weights as those of `nn.Linear`.
        rank: kept and shown, as in FastMoE; it changes nothing.

    Attributes:
        weight: `(e, O, I)`.
        bias: `(e, O)` or None.

    Raises:
        ValueError: a size below 1.
    """

    def __init__(self, num_expert: int, in_feat: int, out_feat: int, bias: bool = True, rank: int = 0) -> None:
        super().__init__()
        self.num_expert = check_int("num_expert", num_expert, 1)
        self.in_feat, self.out_feat = check_int("in_feat", in_feat, 1), check_int("out_feat", out_feat, 1)
        self.rank = rank
        self.weight = nn.Parameter(torch.empty(num_expert, out_feat, in_feat))
        self.bias = nn.Parameter(torch.empty(num_expert, out_feat)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise anew, as after construction."""
        for weight_OI in self.weight:
            nn.init.kaiming_uniform_(weight_OI, a=math.sqrt(5))
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, inp: Tensor, fwd_expert_count: Tensor | Sequence[int]) -> Tensor:
        """The experts' outputs, in the order of the rows.

        Args:
            inp: `(R, I)`, the first expert's rows first; computed in the dtype of the weights.
            fwd_expert_count: whole numbers `(e,)`, how many rows each expert has; they add up to R.

        Returns:
            `(R, O)`.

        Raises:
            ValueError: shapes that do not fit; counts that do not add up (on a GPU they are not looked at).
        """
        counts_e = torch.as_tensor(fwd_expert_count)
        if counts_e.shape != (self.num_expert,) or counts_e.is_floating_point():
            raise ValueError(
                f"fwd_expert_count must be {self.num_expert} whole numbers, one for each expert, "
                f"got {counts_e.dtype} {tuple(counts_e.shape)}"
            )
        if not counts_e.is_cuda and int(counts_e.sum()) != len(inp):
            raise ValueError(f"fwd_expert_count adds up to {int(counts_e.sum())} rows, inp has {len(inp)}")
        if self.num_expert == 1 and inp.shape[1:] == (self.in_feat,):
            return F.linear(inp.to(self.weight.dtype), self.weight[0], None if self.bias is None else self.bias[0])
        return MOELinear.apply(inp.to(self.weight.dtype), counts_e, self.weight, self.bias)

    def extra_repr(self) -> str:
        return (
            f"num_expert={self.num_expert}, in_features={self.in_feat}, out_features={self.out_feat}, "
            f"bias={self.bias is not None}, rank={self.rank}"
        )
