"""The experts of transformers' Mixtral block, with each of its implementations and the problem's weights."""

import importlib.util

from torch import Tensor, nn

from fastmoe.bench.problem import Contender, Problem, RefusedError

IMPLEMENTATIONS = ["eager", "batched_mm", "grouped_mm"]
_MOST_GATHERED_BYTES = 4 << 30


def mixtral(p: Problem, implementation: str) -> Contender:
    """`MixtralExperts.forward(x, ids, weights)`: routing given, as for the others."""
    if importlib.util.find_spec("transformers") is None:
        raise RefusedError("not installed: transformers")
    if p.activation != "swiglu":
        raise RefusedError("Mixtral's experts are swiglu")
    _, E, D, H, K = p.shape
    gathered = p.ids_TK.numel() * p.w1[0].numel() * p.w1.element_size()
    if implementation == "batched_mm" and gathered > _MOST_GATHERED_BYTES:
        raise RefusedError(f"it would gather {gathered / 2**30:.0f} GiB of weights, one copy for each row")
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralExperts

    config = MixtralConfig(hidden_size=D, intermediate_size=H, num_local_experts=1, num_experts_per_tok=K)
    config._experts_implementation = implementation
    experts = MixtralExperts(config)
    experts.num_experts = E
    experts.gate_up_proj, experts.down_proj = (nn.Parameter(w.detach()) for w in (p.w1, p.w2))  # no copy
    learned = [experts.gate_up_proj, experts.down_proj]

    def forward() -> Tensor:
        return experts(p.x_TD, p.ids_TK, p.weights_TK.to(p.dtype))

    def grads() -> list[Tensor]:
        return [*p.grads()[:2], *(w.new_zeros(w.shape) if w.grad is None else w.grad for w in learned)]

    return Contender(forward, [p.x_TD, p.weights_TK, *learned], p.grad_TD, grads)
