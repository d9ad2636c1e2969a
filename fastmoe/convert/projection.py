"""One linear map of a dense block, whichever way its module stores it."""

from dataclasses import dataclass

from torch import Tensor, nn


@dataclass(frozen=True)
class Projection:
    """`x @ weight.T + bias`, with `weight` (out, in) and `bias` (out,) or None; `trainable` as the dense weight was."""

    weight: Tensor
    bias: Tensor | None
    trainable: bool
    bias_trainable: bool

    @classmethod
    def of(cls, block: nn.Module, name: str) -> "Projection":
        module = block.get_submodule(name)
        weight, bias = module.get_parameter("weight"), module._parameters.get("bias")
        oriented = weight.t() if _is_transposed(module) else weight
        return cls(oriented, bias, weight.requires_grad, bias is not None and bias.requires_grad)

    def halves(self) -> tuple["Projection", "Projection"]:
        """The map of the first half of the outputs, and of the second."""
        weights = self.weight.chunk(2)
        biases = (None, None) if self.bias is None else self.bias.chunk(2)
        first, second = (
            Projection(weight, bias, self.trainable, self.bias_trainable)
            for weight, bias in zip(weights, biases, strict=True)
        )
        return first, second


@dataclass(frozen=True)
class Parts:
    """The projections of a feed-forward block: `up` and `gate` are (H, D), `down` is (D, H)."""

    up: Projection
    down: Projection
    gate: Projection | None = None

    @property
    def fit(self) -> bool:
        """Whether their shapes are those of one block."""
        shape = self.up.weight.shape
        return shape == self.down.weight.shape[::-1] and (self.gate is None or self.gate.weight.shape == shape)


def is_projection(module: object) -> bool:
    """Whether `module` is a linear map and nothing else: no adapter, no parametrisation, no quantised weight."""
    if not isinstance(module, nn.Module) or not set(module._parameters) <= {"weight", "bias"} or module._modules:
        return False
    weight = module._parameters.get("weight")
    if weight is None or not weight.is_floating_point():
        return False
    return type(module).forward is nn.Linear.forward or _is_transposed(module)


def _is_transposed(module: nn.Module) -> bool:
    """GPT-2's `Conv1D`: a weight (in, out), and `nf` for the number of outputs."""
    weight = module._parameters.get("weight")
    return weight is not None and weight.dim() == 2 and weight.shape[1] == getattr(module, "nf", None)


def in_features(module: nn.Module) -> int | None:
    """The width that a linear map takes, None for any other module."""
    if isinstance(module, nn.Linear):
        return module.in_features
    return module.get_parameter("weight").shape[0] if _is_transposed(module) else None
