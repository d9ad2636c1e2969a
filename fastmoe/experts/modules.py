"""Any `nn.Module` as an expert, also modules of different kinds side by side."""

import copy
from collections import Counter
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastmoe.experts.base import Experts, ZeroGrad
from fastmoe.experts.reset import reset_where_possible

ExpertLike = nn.Module | Callable[[], nn.Module] | Sequence[nn.Module | Callable[[], nn.Module]]


class ElsewhereExpert(nn.Module):
    """Stands where an expert would stand that another process holds."""


class ModuleExperts(Experts):
    """Experts that are modules of their own; expert e is `modules_list[e]`, called with the rows it was sent.

    Args:
        modules: E modules, each `(rows, d_model) -> (rows, d_out)`, with one d_out for all.
    """

    def __init__(self, modules: Sequence[nn.Module], backend: str = "auto") -> None:
        super().__init__(len(modules), backend)
        self.modules_list = nn.ModuleList(modules)
        self._sizes: tuple[list[int], int] | None = None

    def check_spread(self, held_P: Sequence[range]) -> None:
        """Whether the experts can live on P processes, given which each is to hold.

        Raises:
            ValueError: experts of different processes share a parameter.
        """
        users: dict[nn.Parameter, set[int]] = {}
        for e, module in enumerate(self.modules_list):
            for parameter in module.parameters():
                users.setdefault(parameter, set()).add(e)
        for shared in users.values():
            if not any(shared <= set(held) for held in held_P):
                raise ValueError(
                    f"experts {sorted(shared)} share a parameter, so one process must hold them all; "
                    f"the processes are to hold {[list(held) for held in held_P]}"
                )

    def keep(self, held: range) -> None:
        """Leave all experts but these to other processes."""
        self._sizes = self.parameters_per_expert(), self.total_parameters()
        for e in range(self.num_experts):
            if e not in held:
                self.modules_list[e] = ElsewhereExpert()
        self.held = held

    def reset_parameters(self) -> None:
        """Initialise every expert anew where it can: each part that has `reset_parameters`."""
        reset_where_possible(self.modules_list)

    def compute(self, rows_ND: Tensor, offsets_E: Tensor) -> Tensor:
        """Rows sorted by expert in, rows out, `(N, d_out)`; rows past the last offset give zeros.

        Raises:
            ValueError: an expert returns another number of rows, or another width than the others.
        """
        outputs: list[Tensor] = []
        unused: list[nn.Parameter] = []
        start = 0
        for e, end in zip(self.held, offsets_E.tolist(), strict=True):
            if end > start:
                outputs.append(self._call(e, rows_ND[start:end], outputs))
            else:
                unused += [p for p in self.modules_list[e].parameters() if p.requires_grad]
            start = end
        if not outputs:
            outputs.append(self._call(self.held.start, rows_ND[:0], outputs))
        rows_NO = F.pad(torch.cat(outputs), (0, 0, 0, len(rows_ND) - start))
        return ZeroGrad.apply(rows_NO, *unused)

    def _call(self, e: int, rows_RD: Tensor, before: list[Tensor]) -> Tensor:
        if torch.is_grad_enabled():
            rows_RD = rows_RD.clone()  # an expert may work in place, and its neighbours' rows share the buffer
        rows_RO = self.modules_list[e](rows_RD)
        if not isinstance(rows_RO, Tensor) or rows_RO.dim() != 2 or len(rows_RO) != len(rows_RD):
            got = tuple(rows_RO.shape) if isinstance(rows_RO, Tensor) else type(rows_RO).__name__
            raise ValueError(
                f"expert {e} was given {tuple(rows_RD.shape)} and must return ({len(rows_RD)}, d_out), got {got}"
            )
        if before and rows_RO.shape[1] != before[0].shape[1]:
            raise ValueError(
                f"all experts must return the same width: expert {e} returned {rows_RO.shape[1]}, "
                f"one before it {before[0].shape[1]}"
            )
        device = rows_RO.device.type
        if torch.is_autocast_enabled(device) and rows_RO.is_floating_point():
            return rows_RO.to(torch.get_autocast_dtype(device))
        return rows_RO

    def parameters_per_expert(self) -> list[int]:
        """How many parameters each expert has of its own; those that several experts share are left out."""
        if self._sizes is not None:
            return self._sizes[0]
        users = Counter(param for module in self.modules_list for param in module.parameters())
        return [sum(p.numel() for p in module.parameters() if users[p] == 1) for module in self.modules_list]

    def total_parameters(self) -> int:
        """How many parameters all E experts have together; those that several share count once."""
        return sum(p.numel() for p in self.parameters()) if self._sizes is None else self._sizes[1]


def build_experts(expert: ExpertLike, num_experts: int) -> list[nn.Module]:
    """The E modules that `fastmoe.MoE(expert=...)` stands for."""
    return build_modules(expert, num_experts)


def build_modules(given: ExpertLike, number: int, role: str = "expert", each: str = "expert") -> list[nn.Module]:
    """As many modules as asked for, from one of the forms in which a user gives them.

    A module is deep-copied, and each copy re-initialised where it can; a callable is called for each one; a list gives
    each one, as a module (used as it is) or a callable (called once). `role` and `each` are words for messages.
    """
    if isinstance(given, nn.Module) and not isinstance(given, nn.ModuleList):
        copies = [copy.deepcopy(given) for _ in range(number)]
        for module in copies:
            reset_where_possible(module)
        return copies
    if isinstance(given, Sequence | nn.ModuleList) and not isinstance(given, str):
        if len(given) != number:
            raise ValueError(f"{role} must list one module for each of {number} {each}s, got {len(given)}")
        return [_one(entry, role) for entry in given]
    return [_one(given, role) for _ in range(number)]


def _one(entry: object, role: str) -> nn.Module:
    if isinstance(entry, nn.Module):
        return entry
    module = entry() if callable(entry) else entry
    if not isinstance(module, nn.Module):
        raise ValueError(f"each {role} must be an nn.Module, or a callable that returns one; got {module!r}")
    return module
