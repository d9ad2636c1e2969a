"""`FMoE`: FastMoE's general layer."""

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten

from fastmoe._errors import check_int
from fmoe.functions import AllGather, Slice, ensure_comm
from fmoe.gates.base_gate import BaseGate
from fmoe.gates.naive_gate import NaiveGate
from fmoe.passage import choices_of, through_experts
from fmoe.workers import GroupAttribute

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

ExpertLike = Callable[[int], nn.Module]


class FMoE(nn.Module):
    """A gate sends each row to K experts; the layer returns the weighted sum of what they answer.

    Input and output are a tensor, or dicts, lists and tuples of tensors with one first dimension, T. An expert is
    called as `expert(rows, counts)` and may return another structure.

    Args:
        num_expert: experts in **each** worker; with a list of experts its length.
        d_model: D.
        world_size: workers with different experts; E is num_expert * world_size.
        mp_group: FastMoE's former name of `slice_group`.
        slice_group: processes that have the same input: each computes a slice of it, all get the whole output.
        moe_group: the workers; None means all processes.
        top_k: K.
        gate: a gate class, or a callable, `(d_model, num_expert, world_size, top_k) -> gate`; `NaiveGate` and its
            subclasses are given `gate_bias=` too, if they take it.
        expert: a class or callable `(d_model) -> module`, called once for each expert of this worker; or a list of
            them; or None: a subclass sets `self.experts`, one module for all of them.
        gate_hook: called as `gate_hook(top_k_idx, top_k_val, None)` in each pass.
        mask: `(T,)` or any shape of T numbers: rows of 0 go to experts, other rows do not.
        mask_dict: what stands in the experts' answer for rows of each other number of the mask; zeros if not named.
        gate_bias: whether the gate's linear layer has a bias.

    Raises:
        ValueError: an argument that does not fit.
    """

    slice_group = GroupAttribute()
    moe_group = GroupAttribute()

    def __init__(
        self,
        num_expert: int = 32,
        d_model: int = 1024,
        world_size: int = 1,
        mp_group: "ProcessGroup | None" = None,
        slice_group: "ProcessGroup | None" = None,
        moe_group: "ProcessGroup | None" = None,
        top_k: int = 2,
        gate: Callable[..., nn.Module] = NaiveGate,
        expert: ExpertLike | Sequence[ExpertLike] | None = None,
        gate_hook: Callable[[Tensor, Tensor, None], Any] | None = None,
        mask: Tensor | None = None,
        mask_dict: dict[int, Any] | None = None,
        gate_bias: bool = True,
    ) -> None:
        super().__init__()
        self.num_expert, self.d_model = check_int("num_expert", num_expert, 1), check_int("d_model", d_model, 1)
        self.world_size, self.top_k = check_int("world_size", world_size, 1), check_int("top_k", top_k, 1)
        if mp_group is not None and slice_group is not None:
            raise ValueError("mp_group is the former name of slice_group: give one of them")
        self.slice_group = mp_group if slice_group is None else slice_group
        self.moe_group = moe_group
        self.slice_size = 1 if self.slice_group is None else self.slice_group.size()
        self.slice_rank = 0 if self.slice_group is None else self.slice_group.rank()
        self.experts_fused = expert is None
        if expert is not None:
            makers = list(expert) if isinstance(expert, Sequence) else [expert] * num_expert
            self.experts: nn.Module = nn.ModuleList(make(d_model) for make in makers)
            self.num_expert = check_int("the number of experts in the list", len(makers), 1)
        self.gate = gate(d_model, self.num_expert, world_size, top_k, **_bias_option(gate, gate_bias))
        if isinstance(self.gate, BaseGate):
            self.gate.moe_group = moe_group
        if world_size > 1 and expert is not None:
            self.mark_parallel_comm()  # workers have different experts: no one may take their mean
        self.gate_hook, self.mask, self.mask_dict = gate_hook, mask, mask_dict

    def expert_fn(self, inp: Any, fwd_expert_count: Tensor) -> Any:
        """The experts' answer, `(R, ...)`, to rows grouped by expert; subclasses may define their own.

        Args:
            inp: `(R, ...)`, or a structure of such.
            fwd_expert_count: int64 `(num_expert,)`, how many rows each expert has.
        """
        if self.experts_fused:
            return self.experts(inp, fwd_expert_count)
        counts = fwd_expert_count.tolist()
        parts = zip(*(leaf.split(counts) for leaf in tree_leaves(inp)), strict=True)
        structure = tree_flatten(inp)[1]
        answers = []
        for expert, count, part in zip(self.experts.children(), counts, parts, strict=True):
            answers.append(tree_flatten(expert(tree_unflatten(part, structure), torch.tensor([count]))))
        leaves = [torch.cat(of_each) for of_each in zip(*(leaves for leaves, _ in answers), strict=True)]
        return tree_unflatten(leaves, answers[0][1])

    def mark_parallel_comm(self, expert_dp_comm: str = "none") -> None:
        """Write on each parameter, as `dp_comm`, which processes share it: "gate" on the gate's, this on the experts'.

        Raises:
            ValueError: there are no experts yet.
        """
        if not hasattr(self, "experts"):
            raise ValueError("mark_parallel_comm marks the experts: set self.experts before")
        experts: list[nn.Module] = self.experts if isinstance(self.experts, list) else [self.experts]
        for module, comm in [*((expert, expert_dp_comm) for expert in experts), (self.gate, "gate")]:
            mark_module_parallel_comm(module, comm)

    def forward(self, moe_inp: Any) -> Any:
        """The weighted sum of the experts' answers, `(T, ...)` or a structure of such.

        Raises:
            ValueError: tensors of different batch sizes, a mask or a gate's answer that does not fit.
        """
        _batch_size(moe_inp, "MoE inputs")
        if self.world_size > 1:
            ensure_comm(tree_leaves(moe_inp)[0], self.moe_group)
        mask_T = self._mask()
        if self.slice_size > 1:
            moe_inp, mask_T = tree_map(self._slice, moe_inp), None if mask_T is None else self._slice(mask_T)
        expert_ids_TK, weights_TK = self._choose(moe_inp, mask_T)
        answer = through_experts(
            moe_inp, expert_ids_TK, self.expert_fn, self.num_expert, self.world_size, self.moe_group
        )
        moe_outp = tree_map(functools.partial(self._weigh, weights_TK=weights_TK, mask_T=mask_T), answer)
        if self.slice_size > 1:
            moe_outp = tree_map(self._join, moe_outp)
        _batch_size(moe_outp, "MoE outputs")
        return moe_outp

    def _choose(self, moe_inp: Any, mask_T: Tensor | None) -> tuple[Tensor, Tensor]:
        """The gate's answer, both `(T, K)`; masked rows go nowhere."""
        num_tokens = _batch_size(moe_inp, "MoE inputs")
        expert_ids, weights = self.gate(moe_inp)
        if self.gate_hook is not None:
            self.gate_hook(expert_ids, weights, None)
        expert_ids_TK, weights_TK = choices_of(expert_ids, weights, num_tokens, self.top_k)
        if mask_T is not None:
            if len(mask_T) != num_tokens:
                raise ValueError(f"mask must have a number for each of {num_tokens} rows, got {len(mask_T)}")
            expert_ids_TK = expert_ids_TK.masked_fill((mask_T != 0).unsqueeze(1), -1)
        return expert_ids_TK, weights_TK

    def _mask(self) -> Tensor | None:
        if (self.mask is None) != (self.mask_dict is None):
            raise ValueError("mask and mask_dict belong together: give both, mask_dict={} for zeros")
        return None if self.mask is None else self.mask.reshape(-1)

    def _weigh(self, answer_NO: Tensor, weights_TK: Tensor, mask_T: Tensor | None) -> Tensor:
        rows_TKO = answer_NO.view(*weights_TK.shape, answer_NO.shape[-1])
        if mask_T is not None:
            for number, value in (self.mask_dict or {}).items():
                value = torch.as_tensor(value, dtype=rows_TKO.dtype, device=rows_TKO.device)
                rows_TKO = torch.where((mask_T == number).view(-1, 1, 1), value, rows_TKO)
        return torch.bmm(weights_TK.unsqueeze(1).to(rows_TKO.dtype), rows_TKO).squeeze(1)

    def _slice(self, whole: Tensor) -> Tensor:
        return Slice.apply(whole, self.slice_rank, self.slice_size, self.slice_group)

    def _join(self, part: Tensor) -> Tensor:
        return AllGather.apply(part, self.slice_rank, self.slice_size, self.slice_group)


def mark_module_parallel_comm(module: nn.Module, comm: str) -> None:
    """Write `comm` on each parameter of `module` as `dp_comm`; see `FMoE.mark_parallel_comm`."""
    for parameter in module.parameters():
        parameter.dp_comm = comm  # type: ignore[attr-defined]


def _bias_option(gate: Callable[..., nn.Module], gate_bias: bool) -> dict[str, bool]:
    """`gate_bias` for a `NaiveGate` or a subclass; those written for FastMoE 1.1.0 do not take it."""
    made: object = gate
    while isinstance(made, functools.partial):
        made = made.func
    if not (isinstance(made, type) and issubclass(made, NaiveGate)):
        return {}
    parameters = inspect.signature(gate).parameters
    if "gate_bias" in parameters or any(one.kind is one.VAR_KEYWORD for one in parameters.values()):
        return {"gate_bias": gate_bias}
    if not gate_bias:
        raise ValueError(f"gate_bias=False was given, but {made.__name__} takes no gate_bias")
    return {}


def _batch_size(structure: Any, what: str) -> int:
    sizes = sorted({len(leaf) for leaf in tree_leaves(structure)})
    if len(sizes) != 1:
        raise ValueError(f"{what} must have the same batch size, got {sizes}")
    return sizes[0]
