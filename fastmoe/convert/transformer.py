"""torch's own Transformer layers, whose feed-forward part lives in the layer itself, and their fused eval paths."""

from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from fastmoe.layer import MoE

# The dropout after the feed-forward part; the layer keeps it.
OUTPUT_DROPOUT: dict[type[nn.Module], str] = {
    nn.TransformerEncoderLayer: "dropout2",
    nn.TransformerDecoderLayer: "dropout3",
}


def output_dropout_of(layer: nn.Module) -> str | None:
    """The attribute of the layer's last dropout; None unless `layer` runs torch's own forward and `_ff_block`."""
    for torch_class, name in OUTPUT_DROPOUT.items():
        if isinstance(layer, torch_class) and _runs_code_of(layer, torch_class):
            return name
    return None


def _runs_code_of(layer: nn.Module, torch_class: Any) -> bool:
    own = type(layer)
    return own.forward is torch_class.forward and getattr(own, "_ff_block", None) is torch_class._ff_block


class _NoFusedPath:
    """Stands for the first layer's weights, at which `nn.TransformerEncoder` looks before its fused path.

    Having `__torch_function__` is what makes it take the ordinary path.
    """

    @property
    def weight(self) -> "_NoFusedPath":
        return self

    bias = weight

    @classmethod
    def __torch_function__(cls, *args: object, **kwargs: object) -> Any:
        return NotImplemented


class _MoEFeedForward(nn.Module):
    """Mixed into the class of a converted layer: its feed-forward part is `self.moe`."""

    dense_class: type[nn.Module]
    output_dropout: str
    moe: MoE
    linear1 = linear2 = _NoFusedPath()

    def _ff_block(self, x: Tensor) -> Tensor:
        dropout = self.get_submodule(self.output_dropout)
        return dropout(_nested(self.moe, x) if x.is_nested else self.moe(x))

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return _blank, (self.dense_class,), self.__getstate__()


def _nested(moe: MoE, x: Tensor) -> Tensor:
    """`moe` over a nested tensor of sequences."""
    sequences = x.unbind()
    rows_TD = moe(torch.cat(sequences))
    return torch.nested.as_nested_tensor(list(rows_TD.split([len(s) for s in sequences])))


@cache
def _class_for(dense_class: Any) -> Any:
    torch_class = next(known for known in OUTPUT_DROPOUT if issubclass(dense_class, known))
    body = {"dense_class": dense_class, "output_dropout": OUTPUT_DROPOUT[torch_class], "__module__": __name__}
    return type(f"MoE{dense_class.__name__}", (_MoEFeedForward, dense_class), body)


def _blank(dense_class: Any) -> nn.Module:
    """An empty converted layer for `copy` and `pickle` to fill."""
    made = _class_for(dense_class)
    return made.__new__(made)


def put_moe_into(layer: nn.Module, moe: MoE) -> None:
    """Replace the feed-forward part of a torch Transformer layer, in place."""
    dense_class: Any = type(layer)
    layer.__class__ = _class_for(dense_class)
    for name in ("linear1", "linear2", "dropout"):
        delattr(layer, name)
    setattr(layer, "activation", None)  # noqa: B010
    layer.moe = moe


def leave_fused_paths(model: nn.Module) -> None:
    """Keep torch's fused eval code, which knows dense weights only, away from layers that hold a MoE."""
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoderLayer | nn.TransformerEncoder):
            if not any(isinstance(m, MoE) for m in module.modules()):
                continue
            if isinstance(module, nn.TransformerEncoder):
                module.use_nested_tensor = False
            else:
                module.activation_relu_or_gelu = 0
