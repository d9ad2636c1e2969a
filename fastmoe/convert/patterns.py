"""The table of known feed-forward blocks, and what a row needs before its inside counts as known."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from fastmoe.convert.measure import Form, known_name, measure
from fastmoe.convert.projection import Parts, Projection, is_projection
from fastmoe.convert.split import obstacle_in, split_pattern_of
from fastmoe.convert.transformer import output_dropout_of


@dataclass(frozen=True)
class Pattern:
    """A row: the attributes that hold a block's projections. Activation and dropout are found by measuring.

    `fused`: the one called `up` computes the gate and what it gates, the gate's half first.
    """

    up: str
    down: str
    gate: str | None = None
    fused: bool = False

    @property
    def names(self) -> tuple[str, ...]:
        return (self.up, self.down) if self.gate is None else (self.up, self.down, self.gate)

    def parts(self, block: nn.Module) -> Parts:
        """The block's projections."""
        up, down = Projection.of(block, self.up), Projection.of(block, self.down)
        if self.fused:
            gate, up = up.halves()
            return Parts(up, down, gate)
        return Parts(up, down, None if self.gate is None else Projection.of(block, self.gate))


PATTERNS = (
    Pattern("c_fc", "c_proj"),  # GPT-2, nanoGPT, CLIP
    Pattern("fc1", "fc2"),  # timm, ViT, Whisper
    Pattern("fc_in", "fc_out"),  # GPT-J
    Pattern("wi", "wo"),  # T5
    Pattern("wi_1", "wo", gate="wi_0"),  # T5 v1.1
    Pattern("dense_h_to_4h", "dense_4h_to_h"),  # Megatron, GPT-NeoX
    Pattern("up_proj", "down_proj"),  # Nemotron
    Pattern("up_proj", "down_proj", gate="gate_proj"),  # Llama, Mistral, Qwen, Gemma
    Pattern("gate_up_proj", "down_proj", fused=True),  # Phi-3, GLM
    Pattern("w3", "w2", gate="w1"),  # Llama reference
    Pattern("w2", "w3", gate="w1"),  # xFormers
    Pattern("w_1", "w_2"),  # The Annotated Transformer
    Pattern("lin1", "lin2"),  # DistilBERT
    Pattern("linear1", "linear2"),
)


@dataclass(frozen=True)
class FeedForward:
    """A block whose inside is known: `output_dropout(down(dropout(activation(up(x)))))`, or gated.

    `activation` is a name that `fastmoe.MoE` knows, or a callable.
    """

    parts: Parts
    activation: str | Callable[[Tensor], Tensor]
    dropout: float
    output_dropout: nn.Module | None

    @property
    def d_model(self) -> int:
        return self.parts.up.weight.shape[1]

    @property
    def d_hidden(self) -> int:
        return self.parts.up.weight.shape[0]

    @property
    def bias(self) -> bool:
        parts = (self.parts.up, self.parts.down, self.parts.gate)
        return any(part is not None and part.bias is not None for part in parts)


def recognise(block: nn.Module) -> FeedForward | str | None:
    """The inside of `block`; or why a block that looks like a row is none; or None when no row looks like it."""
    if output_dropout_of(block) is not None:
        return _torch_layer(block)
    split = split_pattern_of(block)
    if split is not None:
        return obstacle_in(block) or _read(split.chain(block), Pattern(split.up, split.down))
    reason: str | None = None
    for pattern in _rows_for(block):
        found = _read(block, pattern)
        if isinstance(found, FeedForward):
            return found
        reason = reason or found
    return reason


def _rows_for(block: nn.Module) -> list[Pattern]:
    if isinstance(block, nn.Sequential):
        linears = [name for name, child in block.named_children() if is_projection(child)]
        return [Pattern(linears[0], linears[1])] if len(linears) == 2 else []
    return [p for p in PATTERNS if all(block._modules.get(name) is not None for name in p.names)]


def _read(block: nn.Module, pattern: Pattern) -> FeedForward | str | None:
    names = "/".join(pattern.names)
    if not all(is_projection(block.get_submodule(name)) for name in pattern.names):
        return f"its {names} are not all plain Linear layers"
    parts = pattern.parts(block)
    if not parts.fit:
        return None
    obstacle = _obstacle(block, pattern)
    if obstacle is not None:
        return obstacle
    form = measure(block, pattern.parts)
    if form is None:
        return f"its forward does not compute the feed-forward formula over {names}"
    return _feed_forward(parts, form)


def _feed_forward(parts: Parts, form: Form) -> FeedForward:
    dropout = 0.0 if form.dropout is None else form.dropout.p
    return FeedForward(parts, form.activation, dropout, form.output_dropout)


def _obstacle(block: nn.Module, pattern: Pattern) -> str | None:
    """What a stacked expert could not carry over, though the arithmetic may agree."""
    inside = {id(p) for name in pattern.names for p in block.get_submodule(name).parameters()}
    if any(id(p) not in inside for p in block.parameters()) or any(True for _ in block.buffers()):
        return f"it holds parameters or buffers besides {'/'.join(pattern.names)}"
    if has_hooks(block):
        return "it has hooks, which would be lost"
    dtypes = {block.get_submodule(name).get_parameter("weight").dtype for name in pattern.names}
    if len(dtypes) > 1:
        return f"its weights have several dtypes, {', '.join(sorted(str(dtype)[6:] for dtype in dtypes))}"
    extra = further_arguments(block)
    if extra:
        return f"its forward takes more than one argument ({', '.join(p.name for p in extra)})"
    if pattern.gate and _frozen(block, pattern.gate) != _frozen(block, pattern.up):
        return f"one of {pattern.gate} and {pattern.up} is frozen and the other is not"
    return None


def _frozen(block: nn.Module, name: str) -> bool:
    return not any(p.requires_grad for p in getattr(block, name).parameters())


def has_hooks(block: nn.Module) -> bool:
    """Whether anything in `block` has hooks, forward or backward."""
    return any(
        m._forward_hooks or m._forward_pre_hooks or m._backward_hooks or m._backward_pre_hooks for m in block.modules()
    ) or any(p._backward_hooks for p in block.parameters())


def further_arguments(block: nn.Module) -> list[inspect.Parameter]:
    """The arguments that `block.forward` takes besides the first, `*args` and `**kwargs` aside."""
    named = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return [p for p in inspect.signature(block.forward).parameters.values() if p.kind in named][1:]


def _torch_layer(layer: nn.Module) -> FeedForward | str:
    """A torch Transformer layer that runs torch's own code: its form is certain without measuring."""
    linear1, linear2, dropout = (layer.get_submodule(name) for name in ("linear1", "linear2", "dropout"))
    if not (is_projection(linear1) and is_projection(linear2) and type(dropout) is nn.Dropout):
        return "its linear1/linear2/dropout are not plain Linear and Dropout layers"
    if any(has_hooks(part) for part in (linear1, linear2, dropout)):
        return "its linear1/linear2/dropout have forward hooks, which would be lost"
    activation: Any = layer.activation
    if isinstance(activation, nn.Module) and next(activation.parameters(), None) is not None:
        return "its activation has parameters of its own"
    parts = Parts(Projection.of(layer, "linear1"), Projection.of(layer, "linear2"))
    return FeedForward(parts, known_name(activation) or activation, dropout.p, None)
