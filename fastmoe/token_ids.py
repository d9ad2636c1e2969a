"""Vocabulary ids for the routers that go by them, without a change to the model's code."""

from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from fastmoe.layer import MoE
from fastmoe.model import moe_layers


def feed_token_ids(model: nn.Module, embedding: nn.Module | str) -> RemovableHandle:
    """Give what the token embedding is called with to every MoE layer, before each forward pass reaches them.

    ```
    model = fastmoe.moefy(gpt, num_experts=16, top_k=1, router="hash", router_options={"vocab_size": 50257})
    fastmoe.feed_token_ids(model, "transformer.wte")
    ```

    With activation checkpointing, run the backward pass of one batch before the forward pass of the next: what is
    recomputed takes the ids of the latest forward pass.

    Args:
        model: its MoE layers see the tokens in the order and number in which the embedding saw them.
        embedding: the module that is called with the ids, int64, or its name in `model`.

    Returns:
        A handle; `handle.remove()` stops it.

    Raises:
        ValueError: no MoE layer whose router goes by token ids; no such embedding in the model.
    """
    layers = [layer for layer in moe_layers(model).values() if getattr(layer.router, "needs_token_ids", False)]
    if not layers:
        raise ValueError(f"{type(model).__name__} has no MoE layer whose router goes by token ids, such as 'hash'")
    found = _find(model, embedding)
    return found.register_forward_pre_hook(_Feed(layers), with_kwargs=True)


class _Feed:
    """The hook: an object, so that with its model it can be copied and saved."""

    def __init__(self, layers: list[MoE]) -> None:
        self.layers = layers

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        ids: Tensor = args[0] if args else next(iter(kwargs.values()))
        for layer in self.layers:
            layer.token_ids = ids


def _find(model: nn.Module, embedding: nn.Module | str) -> nn.Module:
    for name, module in model.named_modules():
        if module is embedding or name == embedding:
            return module
    raise ValueError(f"{type(model).__name__} has no module {embedding!r}")
