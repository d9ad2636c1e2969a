"""`fastmoe.moefy`, and the libraries whose models need more than their blocks replaced."""

import importlib
import sys
from dataclasses import dataclass
from typing import Any

from torch import nn

from fastmoe import convert
from fastmoe.convert.targets import Target


@dataclass(frozen=True)
class Host:
    """A library: module and class of its models, and the integration for them.

    It has `adopt(model, native)`, called after the blocks are replaced; or where `replaces`, a `moefy` of its own.
    """

    module: str
    model_class: str
    integration: str
    replaces: bool = False

    def made(self, model: nn.Module) -> bool:
        """Whether a model of this library is in `model`."""
        module = sys.modules.get(self.module)  # there is no such model before it is imported
        cls = getattr(module, self.model_class, None)
        return cls is not None and any(isinstance(part, cls) for part in model.modules())


HOSTS = (
    Host("transformers.modeling_utils", "PreTrainedModel", "fastmoe.integrations.huggingface"),
    Host("megatron.core.transformer.module", "MegatronModule", "fastmoe.integrations.megatron", replaces=True),
)


def moefy(
    model: nn.Module,
    num_experts: int,
    top_k: int = 2,
    *,
    target: Target = "auto",
    init: str = "upcycle",
    every: int = 1,
    to_native: bool = False,
    **moe_options: Any,
) -> nn.Module:
    """Replace feed-forward blocks of `model` by `fastmoe.MoE` layers, in place.

    A block whose inside is known becomes stacked experts of the same widths, activation and dropouts: torch's
    Transformer layers, the rows of `fastmoe.convert.PATTERNS`, and `Sequential(Linear, activation, Linear)`. A block is
    run first, so that one that only looks like a row is not taken for it. Any other block is replicated as it is, and
    must take rows `(rows, D)`. Blocks that are a MoE already are left alone: a second call changes nothing.

    A model of Hugging Face transformers becomes one of a model type of its own, `fastmoe_gpt2` for `gpt2`, which
    `save_pretrained` and the Auto classes know once `fastmoe.integrations.huggingface` is imported. Of a model of
    Megatron-Core the MLPs are replaced as `fastmoe.integrations.megatron.moefy` says.

    Args:
        model: any module. Its device, dtype, mode and frozen weights are kept; a block used in several places becomes
            one MoE in all of them.
        num_experts, top_k: E and K of every new layer.
        target: "auto", every known block; or which blocks: a module class, a glob over names as in
            `model.named_modules()`, or a predicate `(name, module) -> bool`. Of nested blocks the outermost counts.
        init: "upcycle", every expert starts as a copy of the dense block, and the model's outputs stay as they were
            (Komatsuzaki et al. 2022, Sparse Upcycling, 2212.05055), given a router that drops nothing and whose weights
            sum to 1 for each token, as "topk" has them; of a router by name that has not, a warning is logged.
            "random": fresh experts.
        every: replace every n-th matching block only: 2 means the 2nd, the 4th and so on.
        to_native: for models of transformers: give the MoE model of transformers itself that has this architecture (for
            LLaMA and Mistral that is Mixtral), a new one, which needs no fastmoe to be loaded.
        moe_options: keyword arguments of `fastmoe.MoE`, in place of what the block says; `d_model` where the width of
            a replicated block cannot be told from it.

    Returns:
        The model; where the model itself is a matching block, the MoE that replaces it.

    Raises:
        ValueError: nothing matches; an unknown option, `init` or target; an option that upcycling cannot follow;
            a block that cannot be an expert. The model is then unchanged.

    Note:
        torch's fused eval path of `nn.TransformerEncoder` knows dense weights only and is switched off. It gives zeros
        at padding positions; the ordinary path computes them like any other.
    """
    if not isinstance(model, nn.Module):
        raise ValueError(
            f"model must be a module, got {type(model).__name__}; give each of several to a call of its own"
        )
    found = [host for host in HOSTS if host.made(model)]
    hosts = [importlib.import_module(host.integration) for host in found]
    if to_native and (not hosts or any(host.replaces for host in found)):
        raise ValueError(f"to_native= is for models of transformers, got {type(model).__name__}")
    for host, integration in zip(found, hosts, strict=True):
        if host.replaces:
            return integration.moefy(model, num_experts, top_k, target=target, init=init, every=every, **moe_options)
    before = [(part, type(part), dict(vars(part)), dict(part._modules)) for part in model.modules()] if hosts else []
    converted = convert.moefy(model, num_experts, top_k, target=target, init=init, every=every, **moe_options)
    try:
        for integration in hosts:
            converted = integration.adopt(converted, to_native)
    except BaseException:
        for part, cls, attributes, children in before:
            part.__class__ = cls
            vars(part).clear()
            vars(part).update(attributes)
            part._modules.update(children)
        raise
    return converted
