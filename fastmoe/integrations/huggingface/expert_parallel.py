"""Expert parallelism inside transformers: `DistributedConfig(ep_size=..., ep_implementation="fastmoe")`."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from fastmoe._processes import Processes, ScaleGradient
from fastmoe.dispatch import RoutedRows, Slices, Spread
from fastmoe.dispatch.parcels import pack_rows

try:
    from transformers.distributed import expert_parallel as theirs
except ImportError:  # transformers older than this way of expert parallelism
    theirs = None  # type: ignore[assignment]

NAME = "fastmoe"
_PLACE = "expert parallelism of transformers"
_Base: Any = object if theirs is None else theirs.EPImplementation


def register() -> None:
    """Make `"fastmoe"` an `ep_implementation` of transformers, where it has such."""
    if theirs is not None:
        theirs.EPImplementationInterface.register(NAME, ExpertParallelism)


class ExpertParallelism(_Base):
    """Rows travel to the process that holds their expert, and back; those of its own experts stay.

    Processes that hold the same batch, those of `tp_mesh`, route a slice of it each, and all get the whole output.

    Gradients of experts are sums over the batches of the processes, as of transformers' own implementations:
    its FSDP divides them.

    Args:
        experts: a module with an even share of the experts, and any `experts_implementation`.
        ep_mesh: the processes that the experts are spread over.
        tp_mesh: those that hold the same batch as this one.
    """

    def __init__(self, experts: nn.Module, ep_mesh: DeviceMesh, tp_mesh: DeviceMesh) -> None:
        super().__init__(experts, ep_mesh, tp_mesh)
        self.spread = Spread(self.num_local_experts * ep_mesh.size(), _processes(ep_mesh), ep_mesh)
        self.slices = Slices(_processes(tp_mesh))
        self.run = torch.compiler.disable(self._run)  # compiled code calls it as it is

    def __call__(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """`(T, H)`, from `(T, H)` and `(T, K)` experts, numbered over all processes, with their weights.

        Raises:
            CollectiveError: another process died or hangs.
        """
        size, num_tokens = self.slices.processes.size, len(hidden_states)
        if size == 1:
            return self.run(hidden_states, top_k_index, top_k_weights)
        x_TD, weights_TK = (ScaleGradient.apply(self.slices.take(x), size) for x in (hidden_states, top_k_weights))
        y_TD = self.run(x_TD, self.slices.take(top_k_index), weights_TK)
        return self.slices.gather(ScaleGradient.apply(y_TD, 1 / size), num_tokens)

    def _run(self, x_TD: Tensor, expert_ids_TK: Tensor, weights_TK: Tensor) -> Tensor:
        num_tokens, top_k = expert_ids_TK.shape
        token_ids_N = torch.arange(num_tokens, device=x_TD.device).repeat_interleave(top_k)
        rows = RoutedRows(token_ids_N, expert_ids_TK.reshape(-1), weights_TK.reshape(-1), top_k)
        (parcel,), combine, _ = pack_rows(x_TD, rows, self.spread, 1, _PLACE, "auto")
        rows_RD, ticket = parcel.send(x_TD).finish()
        y_RD = self._experts(rows_RD, parcel.rows.expert_ids_N.unsqueeze(1), parcel.rows.weights_N.unsqueeze(1))
        return combine(parcel.back.start(y_RD, after=ticket).finish()[0], num_tokens)

    def _experts(self, rows_RD: Tensor, expert_ids_R1: Tensor, ones_R1: Tensor) -> Tensor:
        """Implementations that loop over rows know no gradient where there is none: they get one of zeros."""
        missing = int(not len(rows_RD))
        more = (F.pad(x, (0, 0, 0, missing)) for x in (rows_RD, expert_ids_R1, ones_R1))
        return self.experts_forward(*more)[: len(rows_RD)]


def _processes(mesh: DeviceMesh) -> Processes:
    return Processes(mesh.get_group(), mesh.get_local_rank(), mesh.size(), _PLACE)
