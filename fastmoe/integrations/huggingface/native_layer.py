"""What a `fastmoe.MoE` layer computes, in the terms of transformers' own MoE families; or why it is none of theirs."""

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass

from fastmoe.dispatch import LocalDispatcher
from fastmoe.experts import MLPExperts
from fastmoe.layer import MoE
from fastmoe.routers import TopKRouter
from fastmoe.routers.capacity import is_limit

HIDDEN_ACTS = {"swiglu": "silu", "geglu": "gelu", "geglu_tanh": "gelu_pytorch_tanh", "reglu": "relu"}


@dataclass(frozen=True)
class NativeLayer:
    """The numbers of a layer that a transformers config holds once for all layers.

    Args:
        num_experts, top_k, d_hidden: E, K, H.
        hidden_act: transformers' name of the activation on the gate half.
        normalized: whether a token's K weights sum to 1.
        shared_d_hidden: hidden width of the shared expert, 0 for none.
        aux_loss_weight: weight of `fastmoe.routers.load_balance_loss` in each layer.
    """

    num_experts: int
    top_k: int
    d_hidden: int
    hidden_act: str
    normalized: bool
    shared_d_hidden: int
    aux_loss_weight: float

    @classmethod
    def of(cls, moe: MoE) -> "NativeLayer":
        """`ValueError` if no family of transformers has such a layer; the message says why."""
        router, experts = moe.router, moe.experts
        if type(moe) is not MoE:
            raise ValueError(f"it is a {type(moe).__name__}, not a plain fastmoe.MoE")
        if not isinstance(router, TopKRouter) or type(router) is not TopKRouter:
            raise ValueError(f"its router is {type(router).__name__}, not the one called 'topk'")
        if not isinstance(experts, MLPExperts):
            raise ValueError("its experts are modules of one's own")
        for obstacle in (*_of_router(router), *_of_experts(moe, experts)):
            raise ValueError(obstacle)
        return cls(
            moe.num_experts,
            moe.top_k,
            experts.d_hidden,
            HIDDEN_ACTS[str(experts.activation)],
            bool(router.normalize) or router.score_after,
            0 if moe.shared is None else moe.shared.w2.in_features,
            router.aux_loss_weight,
        )


def _of_router(router: TopKRouter) -> Iterator[str]:
    if router.score_function != "softmax":
        yield f"its router scores by {router.score_function}, not by softmax"
    if router.scale != 1:
        yield f"its router scales the weights by {router.scale}"
    if router.num_groups != 1:
        yield "its router limits a token's experts to groups"
    if is_limit(router.capacity_factor) or is_limit(router.eval_capacity_factor):
        yield (
            f"its router has a capacity (capacity_factor={router.capacity_factor}, "
            f"eval_capacity_factor={router.eval_capacity_factor}), and no family of transformers drops tokens"
        )
    if router.z_loss_weight:
        yield f"its router has a z-loss (z_loss_weight={router.z_loss_weight}), which transformers would not train with"


def _of_experts(moe: MoE, experts: MLPExperts) -> Iterator[str]:
    if not isinstance(moe.dispatcher, LocalDispatcher) or moe.slices is not None or experts.tp.size > 1:
        yield "it is spread over several processes"
    if experts.activation not in HIDDEN_ACTS:
        yield f"its experts' activation is {experts.activation!r}; transformers has {', '.join(HIDDEN_ACTS)}"
    if experts.b1 is not None:
        yield "its experts have biases"
    if experts.dropout:
        yield f"its experts have a dropout of {experts.dropout}"
    if len({p.dtype for p in moe.parameters()}) > 1:
        yield "its router and its experts differ in dtype"


def same_in_all(layers: Mapping[str, MoE]) -> NativeLayer:
    """What the layers have in common; `ValueError` that names the first layer which is unlike the others."""
    found: dict[str, NativeLayer] = {}
    for name, moe in layers.items():
        try:
            found[name] = NativeLayer.of(moe)
        except ValueError as error:
            raise ValueError(f"layer {name!r}: {error}") from None
    first_name, first = next(iter(found.items()))
    for name, layer in found.items():
        for field, value in asdict(layer).items():
            expected = getattr(first, field)
            if value != expected:
                raise ValueError(
                    f"layer {name!r} has {field}={value}, layer {first_name!r} has {expected}; "
                    "a transformers config holds one value for all layers"
                )
    return first
