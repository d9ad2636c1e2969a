"""`MMoE`: experts shared by several tasks, with one gate per task."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastmoe._device import on_device
from fastmoe._errors import check_int
from fastmoe.experts import (
    ActivationLike,
    DenseExperts,
    DenseModules,
    ExpertLike,
    build_modules,
    reset_where_possible,
)
from fastmoe.monitor import TaskStats
from fastmoe.routers import RouterLinear

MakeExperts = Callable[[int], nn.Module]


class MMoE(nn.Module):
    """Multi-gate Mixture-of-Experts (Ma et al., KDD 2018, equations 6 to 8), and its progressive extension.

    `y_k = tower_k(sum over experts e of softmax(W_k x)_e * expert_e(x))` for each task k. Every expert runs once on
    every token, whatever the number of tasks. Gates compute in float32 at least.

    With `num_task_experts` each task has experts of its own besides the shared ones, and its gate sees both: CGC (Tang
    et al., RecSys 2020, section 4.1). With `num_levels` such networks are stacked: PLE (section 4.2). A shared gate
    over all experts of a level then feeds the shared experts of the next; the last level has none.

    Args:
        d_in: D, width of the tokens.
        num_experts: experts that all tasks share, in each level.
        num_tasks: outputs of the layer.
        d_hidden: hidden width of each built-in expert; 4 * d_in if None.
        d_out: O, width of what built-in experts return, and of every level's input but the first; d_in if None.
        activation: relu, gelu, gelu_tanh, silu; gated: swiglu, geglu, geglu_tanh, reglu; or any callable.
        bias: whether built-in experts have biases.
        expert: experts of one's own, each `(T, d_in) -> (T, d_out)`. A callable without arguments, called for each
            expert; or one module, deep-copied and re-initialised where it can; or, with neither task experts nor
            further levels, a list of `num_experts` modules or callables. With several levels they must return d_in.
        tower: what each task's mixture `(..., d_out)` goes through: a callable, a module or a list, as for `expert`,
            of one module per task. None: the mixture is the output.
        num_task_experts: experts of each task alone, in each level.
        num_levels: levels stacked.
        device, dtype: of the parameters.

    Attributes:
        last_stats: `TaskStats` of the last forward pass.

    Raises:
        ValueError: an argument that does not fit; the message says what was expected and what came.

    Example:
        >>> layer = MMoE(32, num_experts=8, num_tasks=2, d_hidden=64, d_out=16)
        >>> [y.shape for y in layer(torch.randn(4, 32))]
        [torch.Size([4, 16]), torch.Size([4, 16])]
    """

    def __init__(
        self,
        d_in: int,
        num_experts: int,
        num_tasks: int,
        *,
        d_hidden: int | None = None,
        d_out: int | None = None,
        activation: ActivationLike = "relu",
        bias: bool = True,
        expert: ExpertLike | None = None,
        tower: ExpertLike | None = None,
        num_task_experts: int = 0,
        num_levels: int = 1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.d_in = check_int("d_in", d_in, 1)
        self.num_experts = check_int("num_experts", num_experts, 1)
        self.num_tasks = check_int("num_tasks", num_tasks, 1)
        self.num_task_experts = check_int("num_task_experts", num_task_experts, 0)
        self.num_levels = check_int("num_levels", num_levels, 1)
        if dtype is not None and not dtype.is_floating_point:
            raise ValueError(f"dtype must be a floating type, got {dtype}")
        if expert is not None:
            if d_hidden is not None or d_out is not None or activation != "relu" or not bias:
                raise ValueError(
                    "d_hidden, d_out, activation and bias are for built-in experts: leave them out where expert= is "
                    "given"
                )
            _check_list(expert, num_task_experts, num_levels)
        self.d_out = check_int("d_out", d_in if d_out is None else d_out, 1) if expert is None else d_in
        hidden = 4 * d_in if d_hidden is None else d_hidden
        self.last_stats: TaskStats | None = None
        with on_device(device):
            levels: list[nn.Module] = []
            for width in [d_in] + [self.d_out] * (num_levels - 1):
                make = _maker(expert, width, hidden, self.d_out, activation=activation, bias=bias)
                has_next = len(levels) < num_levels - 1
                levels.append(ExtractionLevel(width, num_experts, num_tasks, num_task_experts, make, has_next))
            self.levels = nn.ModuleList(levels).to(device, dtype)
            towers = [] if tower is None else build_modules(tower, num_tasks, "tower", "task")
            self.towers = nn.ModuleList(towers).to(device, dtype)

    def reset_parameters(self) -> None:
        """Initialise gates, experts and towers anew, as after construction."""
        reset_where_possible(self.levels)
        reset_where_possible(self.towers)

    def forward(self, x: Tensor) -> list[Tensor]:
        """Every task's output.

        Args:
            x: `(..., d_in)`, floating; leading dimensions are free, and may be empty.

        Returns:
            num_tasks tensors `(..., d_out)` in the dtype of `x` (under autocast, in the autocast dtype); or what each
            task's tower makes of its own.

        Raises:
            ValueError: wrong width or dtype; experts whose outputs do not fit.
        """
        if not x.is_floating_point():
            raise ValueError(f"x must be floating, got {x.dtype}")
        if x.dim() == 0 or x.shape[-1] != self.d_in:
            raise ValueError(f"x must be (..., {self.d_in}), got {tuple(x.shape)}")
        x_TD = x.reshape(-1, self.d_in)
        shared_TD, tasks_TD = x_TD, [x_TD] * self.num_tasks
        mean_weights = []
        for level in self.levels:
            shared_TD, tasks_TD, mean_KE = level(shared_TD, tasks_TD)
            mean_weights.append(mean_KE)
        self.last_stats = TaskStats(tuple(mean_weights))
        outputs = [task_TO.reshape(*x.shape[:-1], task_TO.shape[-1]) for task_TO in tasks_TD]
        return [tower(y) for tower, y in zip(self.towers, outputs, strict=True)] if len(self.towers) else outputs

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"last_stats": None}

    def extra_repr(self) -> str:
        return (
            f"d_in={self.d_in}, num_experts={self.num_experts}, num_tasks={self.num_tasks}, "
            f"num_task_experts={self.num_task_experts}, num_levels={self.num_levels}"
        )


class ExtractionLevel(nn.Module):
    """Shared experts, experts of each task, and the gates that mix them: S shared, P of each of K tasks.

    Submodules:
        shared, the S shared experts; own, for each task its P experts, empty if P is 0; gates, for each task
        `(S + P, D)`; shared_gate, `(S + K * P, D)`, None in the last level.
    """

    def __init__(
        self,
        d_in: int,
        num_experts: int,
        num_tasks: int,
        num_task_experts: int,
        make_experts: MakeExperts,
        has_next: bool,
    ) -> None:
        super().__init__()
        self.num_experts, self.num_task_experts = num_experts, num_task_experts
        self.shared = make_experts(num_experts)
        self.own = nn.ModuleList(make_experts(num_task_experts) for _ in range(num_tasks if num_task_experts else 0))
        self.gates = nn.ModuleList(RouterLinear(d_in, num_experts + num_task_experts) for _ in range(num_tasks))
        all_experts = num_experts + num_tasks * num_task_experts
        self.shared_gate = RouterLinear(d_in, all_experts) if has_next else None

    def forward(self, shared_TD: Tensor, tasks_TD: Sequence[Tensor]) -> tuple[Tensor | None, list[Tensor], Tensor]:
        """The mixtures for the next level's shared experts, None in the last, and for each task; mean gate weights.

        Args:
            shared_TD: what the shared experts and the shared gate take.
            tasks_TD: for each task what its experts and its gate take.

        Returns:
            `(T, O)`; K of `(T, O)`; `(K, S + K * P)`, without gradient.
        """
        shared_TSO = self.shared(shared_TD)
        own_TPO = [experts(x_TD) for experts, x_TD in zip(self.own, tasks_TD, strict=False)]
        gates_TG = [gate(x_TD).softmax(1) for gate, x_TD in zip(self.gates, tasks_TD, strict=True)]
        gates_TKG = torch.stack(gates_TG, dim=1)
        mixed_TKO = _mix(gates_TKG[..., : self.num_experts], shared_TSO)
        tasks_TO = [mixed_TKO[:, k].clone() for k in range(len(tasks_TD))]  # a tower may work in place on its own
        for k, out_TPO in enumerate(own_TPO):
            tasks_TO[k] += _mix(gates_TKG[:, k : k + 1, self.num_experts :], out_TPO)[:, 0]
        return self._mix_all(shared_TD, [shared_TSO, *own_TPO]), tasks_TO, self._mean_weights(gates_TKG)

    def _mix_all(self, shared_TD: Tensor, outputs: list[Tensor]) -> Tensor | None:
        if self.shared_gate is None:
            return None
        weights_T1E = self.shared_gate(shared_TD).softmax(1).unsqueeze(1)
        parts = weights_T1E.split([out_TEO.shape[1] for out_TEO in outputs], dim=2)
        mixed = [_mix(part, out_TEO)[:, 0] for part, out_TEO in zip(parts, outputs, strict=True)]
        return sum(mixed[1:], mixed[0])

    @torch.no_grad()
    def _mean_weights(self, gates_TKG: Tensor) -> Tensor:
        """`(K, S + K * P)`: each task's mean weights, its own experts' in the columns that are theirs."""
        mean_KG = gates_TKG.sum(0) / max(len(gates_TKG), 1)
        shared_KS, own_KP = mean_KG.split([self.num_experts, self.num_task_experts], dim=1)
        return torch.cat([shared_KS, torch.block_diag(*own_KP)], dim=1) if self.num_task_experts else shared_KS


def _mix(weights_TKE: Tensor, out_TEO: Tensor) -> Tensor:
    """`(T, K, O)`: K weighted sums of each token's expert outputs."""
    return torch.bmm(weights_TKE.to(out_TEO.dtype), out_TEO)


def _maker(expert: ExpertLike | None, d_in: int, d_hidden: int, d_out: int, **options: Any) -> MakeExperts:
    """What makes a number of experts for a level."""
    if expert is None:
        return lambda number: DenseExperts(number, d_in, d_hidden, d_out, **options)
    return lambda number: DenseModules(build_modules(expert, number))


def _check_list(expert: ExpertLike, num_task_experts: int, num_levels: int) -> None:
    if isinstance(expert, Sequence | nn.ModuleList) and (num_task_experts or num_levels > 1):
        raise ValueError(
            "a list of experts stands for the shared experts of one level: give a callable or a module with "
            f"num_task_experts={num_task_experts} and num_levels={num_levels}"
        )
