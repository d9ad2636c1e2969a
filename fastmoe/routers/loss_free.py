"""Auxiliary-loss-free balancing: a bias on each expert, for selection only, that follows the load."""

import warnings
import weakref
from collections.abc import Callable
from typing import Any, Unpack

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.utils.hooks import RemovableHandle

from fastmoe._backward import in_backward
from fastmoe._errors import check_number
from fastmoe._processes import ALONE, Processes
from fastmoe.kernels import sigmoid_shares
from fastmoe.routers.base import register_router
from fastmoe.routers.context import RoutingContext
from fastmoe.routers.groups import check_groups, limit_to_groups
from fastmoe.routers.losses import sequence_balance_loss
from fastmoe.routers.routing import Routing
from fastmoe.routers.token_choice import TokenChoiceOptions, TokenChoiceRouter, count_rows

STEPS_BEFORE_WARNING = 100
_WRAPPED: "weakref.WeakSet[torch.optim.Optimizer]" = weakref.WeakSet()


@register_router("loss_free")
class LossFreeRouter(TokenChoiceRouter):
    """`s = sigmoid(W x)`; the K experts of largest `s_e + b_e`; weight `s_e`, without the bias.

    Wang et al. 2024 (2408.15664), algorithm 1; DeepSeek-V3 (2412.19437), section 2.1.2. After each step of the
    optimizer that trains the router, `b_e += bias_update_rate * sign(mean load - load_e)`. The load is of all training
    passes since the step before, whatever their number, of all processes, before any are dropped; what activation
    checkpointing recomputes counts once (unless the recomputed region is compiled as a whole) and padding never does.

    Args:
        d_model, num_experts, top_k: D, E, K.
        bias_update_rate: u; 0 keeps the bias as it is.
        normalize: whether a token's K weights are divided by their sum; None: where K > 1.
        scale: the weights are multiplied by it.
        num_groups, top_groups: experts come from the best `top_groups` of `num_groups` groups, by the sum of the two
            largest `s_e + b_e` in each.
        sequence_loss_weight: weight of `sequence_balance_loss`, DeepSeek-V3's complement, equations 17 to 20, over the
            choices that there would be without the bias.
        capacity_factor, eval_capacity_factor, min_capacity, drop_by, stats_scope: see `TokenChoiceRouter`. With "local"
            each process would have a bias of its own, so the bias always follows the load of all.

    Buffers:
        bias_E: float32 whatever the model's dtype, saved with the model.

    Raises:
        ValueError: an option that does not fit; `normalize` with K = 1, a weight of constant 1.
    """

    bias_E: Tensor

    def __init__(
        self,
        d_model: int,
        num_experts: int,
        top_k: int = 2,
        *,
        bias_update_rate: float = 0.001,
        normalize: bool | None = None,
        scale: float = 1.0,
        num_groups: int = 1,
        top_groups: int = 1,
        sequence_loss_weight: float = 1e-4,
        **options: Unpack[TokenChoiceOptions],
    ) -> None:
        super().__init__(d_model, num_experts, top_k, **options)
        self.bias_update_rate = check_number("bias_update_rate", bias_update_rate)
        if normalize not in (None, True, False):
            raise ValueError(f"normalize must be True, False or None, got {normalize!r}")
        if normalize and top_k == 1:
            raise ValueError("one weight divided by itself is always 1: with top_k=1 leave normalize out")
        self.normalize = top_k > 1 if normalize is None else normalize
        self.scale = check_number("scale", scale)
        check_groups(num_groups, top_groups, num_experts, top_k)
        self.num_groups, self.top_groups = num_groups, top_groups
        self.sequence_loss_weight = check_number("sequence_loss_weight", sequence_loss_weight)
        self.register_buffer("bias_E", torch.zeros(num_experts, dtype=torch.float32))
        self._load_E = torch.zeros(num_experts, dtype=torch.int64)  # no buffer: DDP would broadcast rank 0's
        self._load_of: Processes = ALONE
        self._missed_steps = 0
        self._hook = _call_after_steps(self)

    def reset_parameters(self) -> None:
        """Initialise the linear map as `nn.Linear` does, and the bias as 0."""
        super().reset_parameters()
        self.bias_E.zero_()
        self._load_E.zero_()

    def forward(self, x_TD: Tensor, context: RoutingContext | None = None) -> Routing:
        context = context or RoutingContext()
        logits_TE = self.proj(x_TD)
        scores_TE = logits_TE.sigmoid()
        biased_TE = limit_to_groups(scores_TE.detach() + self.bias_E, self.num_groups, self.top_groups)
        expert_ids_TK = biased_TE.topk(self.top_k, dim=1).indices
        if self.normalize:
            weights_TK = sigmoid_shares(logits_TE.gather(1, expert_ids_TK))
        else:
            weights_TK = scores_TE.gather(1, expert_ids_TK)
        losses = {}
        if self.sequence_loss_weight:
            unbiased_TK = scores_TE.topk(self.top_k, dim=1).indices
            probs_TE, processes = sigmoid_shares(logits_TE), self.processes(context)
            loss = sequence_balance_loss(probs_TE, unbiased_TK, context.num_sequences, context.token_mask_T, processes)
            losses["sequence_balance"] = self.sequence_loss_weight * loss
        if self.training and self.bias_update_rate:
            self._count(expert_ids_TK, context)
        return self.routing(expert_ids_TK, weights_TK * self.scale, context, losses, scores_TE)

    @torch.no_grad()
    def update_bias(self) -> None:
        """Move the bias by the load since the last update, and start counting anew; without a load do nothing.

        It runs by itself after each step of a `torch.optim.Optimizer` that holds a parameter of the router. Call it,
        on every process, where none does: FSDP1 with `use_orig_params=False`, or an optimizer of float32 copies.
        """
        load_E = self._load_of.sum(self._load_E).to(self.bias_E.device)
        below_mean_E = torch.sign(load_E.sum() - self.num_experts * load_E)
        self.bias_E += self.bias_update_rate * below_mean_E.to(self.bias_E.dtype)
        self._load_E.zero_()

    def _stepped(self, optimizer: torch.optim.Optimizer) -> None:
        """Told after each step of any optimizer."""
        if not self.bias_update_rate or optimizer in _WRAPPED:
            return
        if _holds(optimizer, self):
            self._missed_steps = 0
            found_inf = getattr(optimizer, "found_inf", None)  # a fused optimizer under GradScaler skips steps itself
            if found_inf is None or not bool(found_inf):
                self.update_bias()
            return
        self._missed_steps += 1
        if self._missed_steps == STEPS_BEFORE_WARNING and bool(self._load_E.any()):
            warnings.warn(
                f"loss_free: none of {STEPS_BEFORE_WARNING} optimizer steps held the router's parameters, so its bias "
                "does not follow the load; call update_bias() after each step",
                stacklevel=2,
            )

    @torch.no_grad()
    def _count(self, expert_ids_TK: Tensor, context: RoutingContext) -> None:
        if in_backward():  # recomputed
            return
        if context.token_mask_T is not None:
            expert_ids_TK = torch.where(context.token_mask_T.unsqueeze(1), expert_ids_TK, -1)
        counts_E = count_rows(expert_ids_TK, self.num_experts)
        if self._load_E.device == counts_E.device:
            self._load_E += counts_E
        else:  # FSDP moves buffers, and load_state_dict(assign=True) puts them in place, without a word to the module
            self._load_E = counts_E
        self._load_of = context.processes

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "LossFreeRouter":
        """`Module.to` and the like; the bias stays in float32, as half precision would lose its small steps."""
        before_E = self.bias_E
        super()._apply(fn, recurse)
        device = self.bias_E.device
        if self.bias_E.dtype != torch.float32:
            self.bias_E = torch.empty_like(before_E, device=device) if before_E.is_meta else before_E.to(device)
        load_E = self._load_E
        self._load_E = torch.zeros_like(load_E, device=device) if load_E.is_meta else load_E.to(device)
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self.bias_E = self.bias_E.float()  # assign=True takes the dtype of the file

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_load_E": torch.zeros_like(self._load_E), "_load_of": ALONE, "_hook": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._hook = _call_after_steps(self)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, bias_update_rate={self.bias_update_rate}"


def _call_after_steps(router: LossFreeRouter) -> RemovableHandle:
    """Update the bias after every step of an optimizer that holds a parameter of the router, while it lives."""
    alive = weakref.ref(router)

    def hook(optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        router = alive()
        if router is not None:
            router._stepped(optimizer)

    handle = register_optimizer_step_post_hook(hook)
    weakref.finalize(router, handle.remove)
    return handle


def _note_wrapped(optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Remember an optimizer that another one steps, as `ZeroRedundancyOptimizer` does with a part of the parameters on
    each process: the outer one's step counts.
    """
    inner = getattr(optimizer, "optim", None)
    if isinstance(inner, torch.optim.Optimizer):
        _WRAPPED.add(inner)


register_optimizer_step_pre_hook(_note_wrapped)


def _holds(optimizer: torch.optim.Optimizer, router: nn.Module) -> bool:
    own = {id(parameter) for parameter in router.parameters()}
    return any(id(parameter) in own for group in optimizer.param_groups for parameter in group["params"])
