"""The weights of a model with `fastmoe.MoE` layers, handed to a model of transformers' own MoE family."""

from collections.abc import Mapping

from torch import Tensor, nn
from transformers import PreTrainedModel

from fastmoe.integrations.huggingface.layouts import LAYOUTS
from fastmoe.integrations.huggingface.native_family import EMPTY_SHARED_D_HIDDEN, Family
from fastmoe.layer import MoE

NAMED_IN_ERRORS = 6


def give_weights(native: PreTrainedModel, model: PreTrainedModel, layers: Mapping[str, MoE], family: Family) -> None:
    """Fill `native`, which is on the meta device, with the tensors of `model`; nothing is copied.

    Raises:
        ValueError: the two do not consist of the same modules and weights.
    """
    names = _Names(native, model, layers, family)
    _check_same_modules(native, model, names, family)
    state = {names[name]: tensor for name, tensor in model.state_dict(keep_vars=True).items() if names[name]}
    if hasattr(native.config, "shared_expert_intermediate_size"):
        for name, moe in layers.items():
            state |= {f"{names.place(name)}.{part}": weight for part, weight in _shared_expert(moe).items()}
    shapes, wanted = ({name: t.shape for name, t in some.items()} for some in (state, native.state_dict()))
    wrong = sorted(name for name in shapes.keys() | wanted.keys() if shapes.get(name) != wanted.get(name))
    if wrong:
        raise ValueError(
            f"the weights of {type(model).__name__} and {type(native).__name__} differ, beginning with "
            f"{', '.join(wrong[:NAMED_IN_ERRORS])}"
        )
    trainable = {name: tensor.requires_grad for name, tensor in state.items()}
    native.load_state_dict({name: _alone(tensor) for name, tensor in state.items()}, assign=True)
    for name, parameter in native.named_parameters():
        parameter.requires_grad_(trainable[name])
    native.tie_weights()
    for name, buffer in model.named_buffers():
        module, _, leaf = names[name].rpartition(".")
        setattr(native.get_submodule(module), leaf, buffer.clone())


def class_beneath(module: nn.Module) -> type:
    """The class that a class of fastmoe's was made from; of any other module its class."""
    return next(cls for cls in type(module).__mro__ if not cls.__module__.startswith("fastmoe."))


def _check_same_modules(native: PreTrainedModel, model: PreTrainedModel, names: "_Names", family: Family) -> None:
    """Around the MoE blocks a module must have its counterpart: of the same class, or of the other family's."""
    ours = {
        names[f"{name}."]: class_beneath(module).__name__
        for name, module in model.named_modules()
        if name and names[f"{name}."]
    }
    expected = {
        f"{name}.": type(module).__name__.replace(family.native, family.dense, 1)
        for name, module in native.named_modules()
        if name
    }
    blocks = tuple(f"{names.place(layer)}." for layer in names.layers)
    for name in ours | expected:
        if ours.get(name) != expected.get(name) and not name.startswith(blocks):
            raise ValueError(
                f"module {name[:-1]!r} is of class {ours.get(name)}, expected {expected.get(name)}: "
                "was it added, taken away or wrapped?"
            )


class _Names:
    """Maps the name of a tensor of `model` to its name in `native`; to "" if it goes there in another form."""

    def __init__(
        self, native: PreTrainedModel, model: PreTrainedModel, layers: Mapping[str, MoE], family: Family
    ) -> None:
        self.layers, self.block = tuple(layers), family.block
        ours, theirs = LAYOUTS["fastmoe"], LAYOUTS["fused"]
        self.inside = {ours.router: family.router, **dict(zip(ours.matrices, theirs.matrices, strict=True))}
        self.old_base, self.new_base = (
            "" if part.base_model is part else f"{part.base_model_prefix}." for part in (model, native)
        )

    def __getitem__(self, name: str) -> str:
        layer = next((layer for layer in self.layers if name.startswith(f"{layer}.")), None)
        if layer is None:
            return self._based(name)
        inside = name.removeprefix(f"{layer}.")
        return "" if inside.startswith("shared.") else f"{self.place(layer)}.{self.inside.get(inside, inside)}"

    def place(self, layer: str) -> str:
        """The name of a MoE block."""
        parent, dot, _ = layer.rpartition(".")
        return self._based(parent + dot + self.block)

    def _based(self, name: str) -> str:
        return self.new_base + name.removeprefix(self.old_base) if name.startswith(self.old_base) else name


def _alone(tensor: Tensor) -> Tensor:
    """A parameter of its own on the same memory."""
    return nn.Parameter(tensor.detach(), requires_grad=False) if isinstance(tensor, nn.Parameter) else tensor


def _shared_expert(moe: MoE) -> dict[str, Tensor]:
    """A shared expert and the gate that it stands behind. A gate of zeros halves it, so its output is doubled; without
    a shared expert, one of zeros, which gets no gradient.
    """
    like = moe.router.get_parameter("proj.weight")
    first_HD = like.new_zeros(2 * EMPTY_SHARED_D_HIDDEN, moe.d_model)
    second_DH = like.new_zeros(moe.d_model, EMPTY_SHARED_D_HIDDEN)
    trainable = True
    if moe.shared is not None:
        first_HD, second_DH = moe.shared.w1.weight.detach(), 2 * moe.shared.w2.weight.detach()
        trainable = moe.shared.w1.weight.requires_grad
    gate_HD, up_HD = first_HD.chunk(2)
    weights = {
        "shared_expert.gate_proj.weight": gate_HD,
        "shared_expert.up_proj.weight": up_HD,
        "shared_expert.down_proj.weight": second_DH,
        "shared_expert_gate.weight": like.new_zeros(1, moe.d_model),
    }
    return {name: nn.Parameter(weight, requires_grad=trainable) for name, weight in weights.items()}
