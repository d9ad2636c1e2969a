"""The state of Megatron's optimizers in checkpoints, whatever the expert parallel size.

With expert parallelism Megatron chains an optimizer for experts to that for the rest, and writes each one's state by
itself. Here tensors go by the names of their parameters, and groups of parameters by their hyperparameters.
"""

import copy
from collections.abc import Iterator
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import LocalNonpersistentObject, ShardedBase, ShardedTensorFactory
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import param_group_identifier_keys

HOW = {"distrib_optim_sharding_type": "fully_reshardable"}


class OptimizerState:
    """The state of an optimizer and of those that it chains.

    Args:
        optimizer: of Megatron-Core.
        model_state: the model's `sharded_state_dict`.
        loading: whether it is to take a state, rather than to give its own.

    Attributes:
        tensors: for Megatron's distributed checkpoints, by their place in the states.

    Raises:
        ValueError: an optimizer whose state Megatron could not read again.
    """

    def __init__(self, optimizer: Any, model_state: dict[str, Any], *, loading: bool) -> None:
        chained = getattr(optimizer, "chained_optimizers", [optimizer])
        self.parts = [part for part in chained if not getattr(part, "is_stub_optimizer", False)]
        for part in self.parts:
            _check_loads(part)
            if loading:
                _begin(part)
        self.states = [part.sharded_state_dict(model_state, is_loading=loading, metadata=HOW) for part in self.parts]
        self.tensors = {".".join(map(str, path)): leaf for path, leaf in _leaves(self.states)}

    def plain(self) -> dict[str, Any]:
        """Hyperparameters of all groups, the step, the gradient scaler's state."""
        return {
            "groups": [_without_parameters(group) for state in self.states for group in _inner(state)["param_groups"]],
            "step": next((step for state in self.states if (step := _step(state)) is not None), None),
            "grad_scaler": next((state["grad_scaler"] for state in self.states if "grad_scaler" in state), None),
        }

    def restore(self, tensors: dict[str, Any], plain: dict[str, Any]) -> None:
        """Give the optimizer what a checkpoint has.

        Raises:
            ValueError: a group of parameters that the checkpoint does not know.
        """
        for path, _ in list(_leaves(self.states)):
            *parents, last = path
            _at(self.states, parents)[last] = tensors[".".join(map(str, path))]
        for part, state in zip(self.parts, self.states, strict=True):
            inner = _inner(state)
            inner["param_groups"] = [_saved_group(group, plain["groups"]) for group in inner["param_groups"]]
            if plain["step"] is not None and inner.get("state"):
                inner["state"]["common_step"] = copy.deepcopy(plain["step"])
            if plain["grad_scaler"] is not None and "grad_scaler" in state:
                state["grad_scaler"] = plain["grad_scaler"]
            part.load_state_dict(state)


def _begin(part: Any) -> None:
    """Give SGD's momentum, which Megatron does not, a state to load into."""
    if part.init_state_fn is not None:
        return
    inner = part.optimizer
    for group in inner.param_groups:
        for parameter in group["params"] if group.get("momentum") else ():
            inner.state[parameter].setdefault("momentum_buffer", torch.zeros_like(parameter))
    part.init_state_fn = lambda *_: None


def _check_loads(part: Any) -> None:
    if isinstance(part, DistributedOptimizer) and isinstance(part.optimizer, torch.optim.Optimizer):
        raise ValueError(
            "Megatron's distributed optimizer reads states of Transformer Engine's or Apex's Adam alone, and this is "
            f"PyTorch's {type(part.optimizer).__name__}: install one of them, or give None for the optimizer"
        )


def _inner(state: dict[str, Any]) -> dict[str, Any]:
    """PyTorch's part of the state, which mixed precision and the distributed optimizer have in a dictionary."""
    return state.get("optimizer", state)


def _step(state: dict[str, Any]) -> Any:
    return _inner(state).get("state", {}).get("common_step")


def _leaves(tree: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], Any]]:
    if isinstance(tree, ShardedBase | ShardedTensorFactory):
        yield path, tree
    elif isinstance(tree, dict | list):
        for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree):
            yield from _leaves(value, (*path, key))


def _at(tree: Any, path: list[Any]) -> Any:
    for key in path:
        tree = tree[key]
    return tree


def _without_parameters(group: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in group.items() if key != "params"}


def _identity(group: dict[str, Any]) -> tuple[Any, ...]:
    """By what Megatron tells groups apart, but for whether they are of experts: without expert parallelism none is."""
    keys = [key for key in param_group_identifier_keys if key != "is_expert_parallel"]
    return tuple(group.get(key, group.get(f"pre_{key}")) for key in keys)


def _saved_group(here: dict[str, Any], saved: list[dict[str, Any]]) -> dict[str, Any]:
    """The saved hyperparameters for a group's parameters."""
    alike = [group for group in saved if _identity(group) == _identity(here)]
    if not alike:
        known = ", ".join(str(_identity(group)) for group in saved)
        raise ValueError(f"the optimizer has parameters of {_identity(here)}, the checkpoint those of {known}")
    expert = here["is_expert_parallel"]
    best = next((group for group in alike if group["is_expert_parallel"] == expert), alike[0])
    own = {key: here[key] for key in ("params", "is_expert_parallel") if key in here}
    if isinstance(own.get("params"), LocalNonpersistentObject):
        own["params"] = own["params"].unwrap()
    return copy.deepcopy(best) | own
