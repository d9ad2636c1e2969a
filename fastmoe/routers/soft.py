"""Soft MoE: every slot of every expert takes a weighted mean of a sequence's tokens."""

import torch
from torch import Tensor, nn

from fastmoe._errors import check_int
from fastmoe.routers.base import Router, RouterLinear, register_router
from fastmoe.routers.context import RoutingContext
from fastmoe.routers.routing import SoftRouting

EPS = 1e-6


@register_router("soft")
class SoftRouter(Router):
    """Soft MoE (Puigcerver et al. 2023, 2308.00951, section 2.1): nothing is chosen, so nothing is dropped.

    With logits `x phi` of a sequence's S tokens for the L = E * p slots: a slot's input is the mean of the sequence's
    tokens, weighted by the softmax of its logits over the tokens; a token's output is the mean of all slots' outputs,
    weighted by the softmax of its logits over the slots. Experts compute E * p rows for each sequence, however long.

    It mixes tokens of the whole sequence, so in a causal model it leaks the future. A sequence is the last dimension
    but one of the layer's input: tokens given as `(T, d_model)` are one sequence, those of a batch flattened so
    included.

    Args:
        d_model, num_experts: D, E.
        top_k: has no role.
        slots_per_expert: p.
        normalize: tokens and the columns of phi are divided by their l2 norms, and logits multiplied by a learned
            scale, which keeps the softmax from collapsing as D grows (section 2.3).

    Parameters:
        proj.weight: phi, `(E * p, D)`, expert-major; scale `(1,)`, starting at 1, where normalize.

    Raises:
        ValueError: an option that does not fit; tokens that do not make sequences of one length.
    """

    takes_context = True
    own_init = True

    def __init__(
        self,
        d_model: int,
        num_experts: int,
        top_k: int = 1,
        *,
        slots_per_expert: int = 1,
        normalize: bool = True,
    ) -> None:
        super().__init__(d_model, num_experts, top_k)
        self.slots_per_expert = check_int("slots_per_expert", slots_per_expert, 1)
        if not isinstance(normalize, bool):
            raise ValueError(f"normalize must be True or False, got {normalize!r}")
        self.normalize = normalize
        self.proj = RouterLinear(d_model, num_experts * slots_per_expert)
        self.scale = nn.Parameter(torch.ones(1)) if normalize else None

    def reset_parameters(self) -> None:
        """Initialise phi as `nn.Linear` does, and the scale as 1."""
        super().reset_parameters()
        if self.scale is not None:
            nn.init.ones_(self.scale)

    @property
    def causal(self) -> bool:
        """False."""
        return False

    def forward(self, x_TD: Tensor, context: RoutingContext | None = None) -> SoftRouting:
        context = context or RoutingContext()
        num_tokens, sequences = len(x_TD), context.num_sequences
        length = num_tokens // max(sequences, 1)
        if sequences * length != num_tokens:
            raise ValueError(f"{num_tokens} tokens do not make {sequences} sequences of one length")
        logits_BSL = self._logits(x_TD).view(sequences, length, self.num_experts * self.slots_per_expert)
        return SoftRouting(
            dispatch_BSL=_softmax_over_tokens(logits_BSL, context.token_mask_T),
            combine_BSL=logits_BSL.softmax(2),
            num_tokens=num_tokens,
            num_experts=self.num_experts,
            slots_per_expert=self.slots_per_expert,
        )

    def _logits(self, x_TD: Tensor) -> Tensor:
        if self.scale is None:
            return self.proj(x_TD)
        phi_LD = self.proj.weight
        dtype = torch.promote_types(x_TD.dtype, torch.float32)
        x_TD, phi_LD = x_TD.to(dtype), phi_LD.to(dtype)
        return self.proj(x_TD / _norm(x_TD)) * (self.scale.to(dtype) / _norm(phi_LD).squeeze(1))

    def extra_repr(self) -> str:
        return f"num_experts={self.num_experts}, slots_per_expert={self.slots_per_expert}, normalize={self.normalize}"


def _norm(rows_ND: Tensor) -> Tensor:
    """Each row's l2 norm, `(N, 1)`, kept off 0."""
    return torch.linalg.vector_norm(rows_ND, dim=1, keepdim=True) + EPS


def _softmax_over_tokens(logits_BSL: Tensor, token_mask_T: Tensor | None) -> Tensor:
    """Softmax over each sequence's tokens; padding has weight 0, also where a sequence is nothing else."""
    if token_mask_T is None:
        return logits_BSL.softmax(1)
    mask_BS1 = token_mask_T.view(*logits_BSL.shape[:2], 1)
    lowest = torch.finfo(logits_BSL.dtype).min  # -inf would give NaN where a sequence is padding only
    return torch.where(mask_BS1, torch.where(mask_BS1, logits_BSL, lowest).softmax(1), 0)
