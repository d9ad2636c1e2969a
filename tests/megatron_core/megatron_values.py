"""What a model holds, in the names and the places of its distributed checkpoint: the same in any layout."""

import zlib

import torch


def pieces(model):
    """[(name, shape of the whole, where the piece begins in it, piece)] of what this process holds."""
    return [
        (tensor.key, tensor.global_shape, tensor.global_offset, tensor.data.detach().clone())
        for tensor in sharded(model.sharded_state_dict())
    ]


def gradients(model):
    """As `pieces`: those of the parameters' gradients, where they have been reduced."""
    values = {parameter: parameter.data for parameter in model.parameters()}
    try:
        for parameter in values:
            gradient = getattr(parameter, "main_grad", parameter.grad)
            parameter.data = gradient.to(parameter.dtype)
        return pieces(model)
    finally:
        for parameter, value in values.items():
            parameter.data = value


def whole(answers):
    """{name: tensor} of the pieces of all processes. What several of them hold must be equal, and all be there."""
    made = {}
    for name, shape, begin, piece in (one for answer in answers for one in answer):
        full = made.setdefault(name, torch.full(shape, torch.nan, dtype=torch.float64))
        target = full[_place(shape, begin, piece)]
        held = target.isfinite()
        expected = piece.double().reshape(target.shape)
        torch.testing.assert_close(target[held], expected[held], msg=lambda text, name=name: f"{name}: {text}")
        target.copy_(expected)
    assert not any(full.isnan().any() for full in made.values())
    return made


def fill(model):
    """Give every matrix values that depend on its name and the place in it, not on which process holds what."""
    tensors = [tensor for tensor in sharded(model.sharded_state_dict()) if tensor.data.dim() > 1]
    for tensor in tensors:
        generator = torch.Generator().manual_seed(zlib.crc32(tensor.key.encode()))
        drawn = torch.randn(tensor.global_shape, generator=generator) * 0.2
        here = drawn[_place(tensor.global_shape, tensor.global_offset, tensor.data)]
        tensor.data.detach().copy_(here.reshape(tensor.data.shape))
    again = {(name, begin): piece for name, _, begin, piece in pieces(model)}
    for tensor in tensors:  # else the state dict's tensors are copies, and nothing was filled
        assert torch.equal(again[tensor.key, tensor.global_offset], tensor.data)


def _place(shape, begin, piece):
    """Leading dimensions that a piece lacks are of size 1 in it."""
    sizes = (1,) * (len(shape) - piece.dim()) + tuple(piece.shape)
    return tuple(slice(first, first + size) for first, size in zip(begin, sizes, strict=True))


def sharded(value):
    """The sharded tensors anywhere in a state dict."""
    from megatron.core.dist_checkpointing import ShardedTensor
    from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory

    if isinstance(value, ShardedTensorFactory):
        value = value.build()
    if isinstance(value, ShardedTensor):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    return [tensor for one in value for tensor in sharded(one)] if isinstance(value, list | tuple) else []
