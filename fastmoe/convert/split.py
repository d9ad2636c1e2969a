"""Feed-forward blocks whose parts are children of a larger layer, which calls them one after the other."""

from dataclasses import dataclass

from torch import nn

from fastmoe.layer import MoE


@dataclass(frozen=True)
class SplitPattern:
    """A row: classes of layers, and the children of such a layer that together are the feed-forward block.

    The MoE takes the place of the first child; the others let pass what they get.
    """

    layers: tuple[str, ...]
    children: tuple[str, ...]
    up: str
    down: str

    def chain(self, layer: nn.Module) -> nn.Sequential:
        """The block: the children as one module, each under its number."""
        return nn.Sequential(*(layer.get_submodule(name) for name in self.children))


SPLIT_PATTERNS = (
    SplitPattern(
        # the layer's dropout, residual and norm follow in `output`
        layers=(
            "BertGenerationLayer",
            "BertLayer",
            "CamembertLayer",
            "Data2VecTextLayer",
            "DebertaLayer",
            "DebertaV2Layer",
            "ElectraLayer",
            "ErnieLayer",
            "LayoutLMLayer",
            "MPNetLayer",
            "MegatronBertLayer",
            "RemBertLayer",
            "RoFormerLayer",
            "RobertaLayer",
            "XLMRobertaLayer",
        ),
        children=("intermediate", "output.dense"),
        up="0.dense",
        down="1",
    ),
    SplitPattern(
        layers=(
            "BartDecoderLayer",
            "BartEncoderLayer",
            "BioGptDecoderLayer",
            "BlenderbotDecoderLayer",
            "BlenderbotEncoderLayer",
            "M2M100DecoderLayer",
            "M2M100EncoderLayer",
            "MBartDecoderLayer",
            "MBartEncoderLayer",
            "MarianDecoderLayer",
            "MarianEncoderLayer",
            "OPTDecoderLayer",
            "PLBartDecoderLayer",
            "PLBartEncoderLayer",
            "PegasusDecoderLayer",
            "PegasusEncoderLayer",
            "XGLMDecoderLayer",
        ),
        children=("fc1", "activation_fn", "fc2"),
        up="0",
        down="2",
    ),
)


class Absorbed(nn.Identity):
    """Stands where a part of a dense block stood whose work the MoE before it does."""


def split_pattern_of(layer: nn.Module) -> SplitPattern | None:
    """The row of this layer; None if its class is in none, or it is converted already."""
    for pattern in SPLIT_PATTERNS:
        if type(layer).__name__ in pattern.layers:
            children = [_child(layer, name) for name in pattern.children]
            if all(child is not None and not isinstance(child, MoE | Absorbed) for child in children):
                return pattern
    return None


def absorbed_beside(parent: nn.Module, name: str) -> tuple[str, ...]:
    """The children of `parent` whose work its child `name`, a MoE, does."""
    for pattern in SPLIT_PATTERNS:
        if type(parent).__name__ in pattern.layers and pattern.children[0] == name:
            return pattern.children[1:]
    return ()


def _child(layer: nn.Module, name: str) -> nn.Module | None:
    try:
        return layer.get_submodule(name)
    except AttributeError:
        return None


def obstacle_in(layer: nn.Module) -> str | None:
    """What the layer does between the children that a MoE could not."""
    between = getattr(layer, "activation_dropout", 0)
    return f"it applies dropout {between} itself, behind the activation" if between else None


def put_moe_between(layer: nn.Module, pattern: SplitPattern, moe: MoE) -> None:
    """Replace the feed-forward block in `layer`, in place."""
    first, *rest = pattern.children
    layer.set_submodule(first, moe)
    for name in rest:
        layer.set_submodule(name, Absorbed())
