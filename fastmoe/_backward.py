"""Whether code runs inside a backward pass, as it does when activation checkpointing runs a forward pass again."""

import torch


def backward_pass() -> int:
    """The number of the backward pass that runs now, -1 outside of one."""
    return torch._C._current_graph_task_id()


def in_backward() -> bool:
    """Whether a backward pass runs now; in a compiled pass, which cannot know, False."""
    return not torch.compiler.is_compiling() and backward_pass() != -1
