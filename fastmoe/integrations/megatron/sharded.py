"""Experts, router and shared expert in Megatron's distributed checkpoints, as its own MoELayer keeps them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory
from megatron.core.transformer.utils import ensure_metadata_has_dp_cp_group, make_sharded_object_for_checkpoint
from megatron.core.utils import make_sharded_tensor_for_checkpoint
from torch import Tensor, nn

from fastmoe.experts import MLPExperts, ModuleExperts, is_gated
from fastmoe.integrations.megatron.groups import Groups
from fastmoe.layer import MoE
from fastmoe.parallel.hidden import split_dimension
from fastmoe.parallel.shard import expert_parameters

KEYS = {"w1": "linear_fc1.weight", "b1": "linear_fc1.bias", "w2": "linear_fc2.weight", "b2": "linear_fc2.bias"}
RENAMED = {
    "router.proj.weight": "router.weight",
    "router.proj.bias": "router.bias",
    "router.bias_E": "router.expert_bias",
    "shared.w1.": "shared_experts.linear_fc1.",
    "shared.w2.": "shared_experts.linear_fc2.",
}


def layer_state_dict(
    moe: MoE, groups: Groups, prefix: str, offsets: tuple[Any, ...], metadata: dict[str, Any] | None
) -> dict[str, Any]:
    """Of a whole layer, whose attribute `moe` this is."""
    metadata = ensure_metadata_has_dp_cp_group(metadata)
    own = {id(parameter) for parameter in expert_parameters(moe).values()}
    one_by_one = bool(metadata.get("singleton_local_shards", False))
    gated = moe.shared is not None and is_gated(moe.shared.activation)
    dp_cp = metadata["dp_cp_group"]
    found: dict[str, Any] = {}
    for name, tensor in moe.state_dict(keep_vars=True).items():
        if id(tensor) in own:
            continue
        key = f"{prefix}{_megatron_name(name)}"
        if gated and name.startswith("shared.w1."):
            replica = (0, groups.tp.rank(), dp_cp.rank())
            found[f"{prefix}moe.{name}"] = _halves(tensor, key, offsets, replica, one_by_one)
        else:
            found[f"{prefix}moe.{name}"] = make_sharded_tensor_for_checkpoint(
                tensor, key, offsets, tp_group=groups.tp, dp_cp_group=dp_cp
            )
    if moe.shared is not None:
        replica = (0, groups.tp.rank(), dp_cp.rank())
        found |= _extra_states(f"{prefix}moe.shared.", f"{prefix}shared_experts.", offsets, replica)
    where = f"{prefix}moe.experts."
    if isinstance(moe.experts, ModuleExperts):
        return found | dict(_modules_state_dict(moe.experts, groups, where, f"{prefix}experts.", offsets))
    return found | stacked_state_dict(moe.experts, groups, where, f"{prefix}experts.", offsets, metadata)


def _halves(
    whole: Tensor, key: str, offsets: tuple[Any, ...], replica: tuple[int, int, int], one_by_one: bool
) -> ShardedTensorFactory:
    """Of a matrix of a gate and what it gates, two tensors."""

    def build(key: str, whole: Tensor, replica_id: Any, flattened_range: slice | None) -> list[ShardedTensor]:
        made = []
        for number, (suffix, half) in enumerate(zip(("_w", "_v"), whole.chunk(2), strict=True)):
            name, place = (key + suffix, ()) if one_by_one else (key, ((len(offsets), number, 2),))
            axes = len(offsets)
            made.append(
                ShardedTensor.from_rank_offsets(
                    name, half, *offsets, *place, replica_id=replica_id, prepend_axis_num=axes
                )
            )
        return made

    return ShardedTensorFactory(key, whole, build, torch.cat, replica)


def _megatron_name(name: str) -> str:
    for ours, theirs in RENAMED.items():
        if name.startswith(ours):
            return theirs + name.removeprefix(ours)
    return name


def stacked_state_dict(
    experts: MLPExperts,
    groups: Groups,
    prefix: str,
    key_prefix: str,
    offsets: tuple[Any, ...],
    metadata: dict[str, Any] | None,
) -> dict[str, Any]:
    """Of built-in experts; `prefix` of their names in the module, `key_prefix` of the keys in the checkpoint."""
    one_by_one = bool((metadata or {}).get("singleton_local_shards", False))
    found = {}
    for name, stacked in experts.named_parameters(recurse=False):
        shards = _Shards(experts, groups, name, offsets, one_by_one)
        found[prefix + name] = ShardedTensorFactory(
            f"{key_prefix}experts.{{}}{KEYS[name]}", stacked, shards.build, shards.merge, shards.replica
        )
    for number in experts.held:
        where = f"{number}." if one_by_one else ""
        within = offsets if one_by_one else (*offsets, (len(offsets), number, experts.num_experts))
        replica = (0, groups.expert_tp.rank, groups.expert_dp_rank)
        found |= _extra_states(f"{prefix}{number}.", f"{key_prefix}experts.{where}", within, replica)
    return found


def _extra_states(prefix: str, key_prefix: str, offsets: tuple[Any, ...], replica: Any) -> dict[str, Any]:
    """What Megatron's two linear layers write beside their weights, and want to read: nothing, but it must be there."""
    names = [f"{linear}._extra_state" for linear in ("linear_fc1", "linear_fc2")]
    return {
        prefix + name: make_sharded_object_for_checkpoint(None, key_prefix + name, offsets, replica) for name in names
    }


def forget_extra_states(module: nn.Module) -> None:
    """Have `load_state_dict` pass over what `_extra_states` put into the state dict."""

    def forget(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
        for key in [key for key in state if key.startswith(prefix) and key.endswith("._extra_state")]:
            del state[key]

    module.register_load_state_dict_pre_hook(forget)


@dataclass(frozen=True)
class _Shards:
    """One stacked parameter, which a checkpoint holds expert by expert, and the halves of a gated one by themselves.

    Attributes:
        offsets: where the layer stands in the model, `(axis, number, of how many)`.
        one_by_one: each expert has a key of its own, with its number.
    """

    experts: MLPExperts
    groups: Groups
    name: str
    offsets: tuple[Any, ...]
    one_by_one: bool

    @property
    def halves(self) -> int:
        return 2 if is_gated(self.experts.activation) and self.name in ("w1", "b1") else 1

    @property
    def replica(self) -> tuple[int, int, int]:
        copies = 0 if split_dimension(self.name) is not None else self.groups.expert_tp.rank
        return 0, copies, self.groups.expert_dp_rank

    def build(self, key: str, stacked: Tensor, replica_id: Any, flattened_range: slice | None) -> list[ShardedTensor]:
        """The checkpoint's tensors; `stacked` may be an optimizer's state in place of the parameter.

        Raises:
            ValueError: an optimizer that flattens its states.
        """
        if flattened_range is not None:
            raise ValueError("experts cannot be saved from a flattened range: use another optimizer sharding type")
        return [
            self._shard(key, part, number, half, replica_id)
            for number, matrix in zip(self.experts.held, stacked, strict=True)
            for half, part in enumerate(matrix.chunk(self.halves))
        ]

    def _shard(self, key: str, part: Tensor, number: int, half: int, replica_id: Any) -> ShardedTensor:
        offsets, suffix = list(self.offsets), ""
        if not self.one_by_one:
            offsets.append((len(offsets), number, self.experts.num_experts))
        elif self.halves == 2:
            suffix = ("_w", "_v")[half]
        first, dim, tp = len(offsets), split_dimension(self.name), self.groups.expert_tp
        together = 1 if suffix else self.halves
        if dim is not None and together * tp.size > 1:
            begin = tp.rank + (0 if suffix else half * tp.size)
            offsets.append((first + dim - 1, begin, together * tp.size))
        return ShardedTensor.from_rank_offsets(
            key.format(f"{number}." if self.one_by_one else "") + suffix,
            part,
            *offsets,
            replica_id=replica_id,
            prepend_axis_num=first,
        )

    @torch.no_grad()
    def merge(self, parts: list[Tensor]) -> Tensor:
        """The stacked parameter again."""
        each = self.halves
        return torch.stack([torch.cat(parts[i : i + each]) for i in range(0, len(parts), each)])


def _modules_state_dict(
    experts: ModuleExperts, groups: Groups, prefix: str, key_prefix: str, offsets: tuple[Any, ...]
) -> Iterator[tuple[str, ShardedTensor]]:
    """Of experts of one's own: each has keys of its own, with its number, since they may differ in kind."""
    for number in experts.held:
        module: nn.Module = experts.modules_list[number]
        for name, tensor in module.state_dict(keep_vars=True).items():
            yield (
                f"{prefix}modules_list.{number}.{name}",
                ShardedTensor.from_rank_offsets(
                    f"{key_prefix}modules.{number}.{name}",
                    tensor,
                    *offsets,
                    replica_id=(0, groups.expert_tp.rank, groups.expert_dp_rank),
                    prepend_axis_num=len(offsets),
                ),
            )
