"""A multiplier of balance losses that is known only in backward: written there, and read later in the same pass.

The two are operators, since code that `torch.compile` traces in pieces would otherwise read a copy from before. They
keep their order by what they return: what is read depends on a gradient that depends on what was written. A write is
no mutation that autograd should see, as nothing is differentiated by it.
"""

import torch
from torch import Tensor


@torch.library.custom_op("fastmoe::write_multiplier", mutates_args=())
def write_multiplier(grad: Tensor, multiplier: Tensor, share: Tensor) -> Tensor:
    """A copy of `grad`; `multiplier` becomes its product with `share`. All have no dimension."""
    multiplier.data.copy_(grad * share)
    return grad.clone()


@write_multiplier.register_fake
def _(grad: Tensor, multiplier: Tensor, share: Tensor) -> Tensor:
    return torch.empty_like(grad)


@torch.library.custom_op("fastmoe::read_multiplier", mutates_args=())
def read_multiplier(multiplier: Tensor, after: Tensor, like: Tensor) -> Tensor:
    """The value of `multiplier` once `after` is computed, in the dtype and on the device of `like`."""
    return multiplier.to(like).clone()


@read_multiplier.register_fake
def _(multiplier: Tensor, after: Tensor, like: Tensor) -> Tensor:
    return like.new_empty(())
