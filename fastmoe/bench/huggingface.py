"""The experts of transformers' Mixtral block, with each of its implementations and the problem's weights."""

import importlib.util

from torch import Tensor, nn

from fastmoe.bench.problem import Contender, Problem, RefusedError

IMPLEMENTATIONS = ["eager", "batched_mm", "grouped_mm", "fastmoe"]
_MOST_GATHERED_BYTES = 4 << 30
_MOST_FILLED_BYTES = 32 << 30


def named(implementation: str) -> str:
    return f"HF {implementation}"


NAMES = tuple(map(named, IMPLEMENTATIONS))
*THEIRS, OURS = NAMES


def mixtral(p: Problem, implementation: str) -> Contender:
    """`MixtralExperts.forward(x, ids, weights)`: routing given, as for the others."""
    if importlib.util.find_spec("transformers") is None:
        raise RefusedError("not installed: transformers")
    if p.activation != "swiglu":
        raise RefusedError("Mixtral's experts are swiglu")
    refuse_too_large(p, implementation)
    experts = experts_of(p, implementation)
    learned = list(experts.parameters())

    def forward() -> Tensor:
        return experts(p.x_TD, p.ids_TK, p.weights_TK.to(p.dtype))

    def grads() -> list[Tensor]:
        return [*p.grads()[:2], *(w.new_zeros(w.shape) if w.grad is None else w.grad for w in learned)]

    return Contender(forward, [p.x_TD, p.weights_TK, *learned], p.grad_TD, grads)


def refuse_too_large(p: Problem, implementation: str) -> None:
    gathered = p.ids_TK.numel() * p.w1[0].numel() * p.w1.element_size()
    if implementation == "batched_mm" and gathered > _MOST_GATHERED_BYTES:
        raise RefusedError(f"it would gather {gathered / 2**30:.0f} GiB of weights, one copy for each row")
    filled = p.expert_bytes * p.shape[1]
    if implementation == "eager" and p.backward and filled > _MOST_FILLED_BYTES:
        raise RefusedError(f"its backward would fill {filled / 2**30:.0f} GiB, all weights' gradient for each expert")


def experts_of(p: Problem, implementation: str) -> nn.Module:
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralExperts

    if implementation == "fastmoe":
        from fastmoe.integrations.huggingface import experts as ours

        ours.register()
    _, E, D, H, K = p.shape
    config = MixtralConfig(hidden_size=D, intermediate_size=H, num_local_experts=1, num_experts_per_tok=K)
    config._experts_implementation = implementation
    experts = MixtralExperts(config)
    experts.num_experts = E
    experts.gate_up_proj, experts.down_proj = (nn.Parameter(w.detach()) for w in (p.w1, p.w2))  # no copy
    return experts
