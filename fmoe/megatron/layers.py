"""`MegatronMLP`, and `fmoefy`, which puts it in the place of a model's MLPs."""

from typing import TYPE_CHECKING, Any

from torch import nn

from fastmoe._errors import check_int, check_number
from fastmoe.integrations.megatron import FastMoELayer
from fastmoe.integrations.megatron.convert import check_bare, places, put_layers
from fastmoe.integrations.megatron.groups import Groups
from fmoe.megatron.gates import GateLike, choose_gate, router_of

if TYPE_CHECKING:
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.transformer.transformer_config import TransformerConfig


class MegatronMLP(FastMoELayer):
    """FastMoE's layer in the place of an MLP of Megatron-Core, with one of FastMoE's gates.

    The workers are Megatron's expert parallel group. Activation, biases and first values are those that the
    configuration says.

    Args:
        config: Megatron's. With expert parallelism its `num_moe_experts` must be that of all workers together.
        layer_idx: which layer of the model, from 0; in a spec None, where Megatron says it afterwards.
        fmoe_num_experts: experts in **each** worker; None: the worker's share of `config.num_moe_experts`.
        hidden_hidden_size: H, of each expert, whole; None: `config.ffn_hidden_size` divided by K, so that a token costs
            what it cost before.
        top_k: K; None: `config.moe_router_topk`, 2 by default.
        gate: a gate class or what makes one, `(d_model, num_expert, world_size, top_k) -> gate`, or its name.
        balance_strategy: FastMoE's name of a gate instead: naive, noisy, gshard, switch or swipe.
        balance_loss_weight: of the mean of all layers' balance losses, which is added to the loss by itself.
        distributed_experts: False for the same experts in all workers, which Megatron calls
            `expert_model_parallel_size=1`.
        moe_options: further arguments of `FastMoELayer`.

    Raises:
        ValueError: an argument that does not fit.
    """

    def __init__(
        self,
        config: "TransformerConfig",
        layer_idx: int | None = None,
        fmoe_num_experts: int | None = None,
        hidden_hidden_size: int | None = None,
        top_k: int | None = None,
        gate: GateLike | None = None,
        *,
        balance_strategy: str | None = None,
        balance_loss_weight: float = 1.0,
        distributed_experts: bool = True,
        pg_collection: "ProcessGroupCollection | None" = None,
        **moe_options: Any,
    ) -> None:
        workers = Groups.of(pg_collection).ep
        if not distributed_experts and workers.size > 1:
            raise ValueError(
                "distributed_experts=False, the same experts in all workers, needs expert_model_parallel_size=1, got "
                f"{workers.size}"
            )
        if fmoe_num_experts is None and config.num_moe_experts is None:
            raise ValueError("give fmoe_num_experts=, or TransformerConfig(num_moe_experts=)")
        each = None if fmoe_num_experts is None else check_int("fmoe_num_experts", fmoe_num_experts, 1)
        chosen = check_int("top_k", config.moe_router_topk if top_k is None else top_k, 1)
        weight = check_number("balance_loss_weight", balance_loss_weight) / config.num_layers
        super().__init__(
            config,
            None if each is None else each * workers.size,
            chosen,
            d_hidden=_hidden(config, chosen) if hidden_hidden_size is None else hidden_hidden_size,
            router=router_of(choose_gate(gate, balance_strategy), workers, weight),
            pg_collection=pg_collection,
            **moe_options,
        )
        if layer_idx is not None:
            self.set_layer_number(layer_idx + 1)

    @property
    def gate(self) -> nn.Module:
        """The gate; `get_loss()` is its balance loss in the last pass, without gradient."""
        return self.moe.router.gate  # type: ignore[return-value]


def _hidden(config: "TransformerConfig", top_k: int) -> int:
    if config.ffn_hidden_size % top_k:
        raise ValueError(
            f"ffn_hidden_size={config.ffn_hidden_size} is not a multiple of top_k={top_k}: give hidden_hidden_size"
        )
    return config.ffn_hidden_size // top_k


def fmoefy(
    model: nn.Module,
    fmoe_num_experts: int | None = None,
    distributed_experts: bool | None = True,
    hidden_hidden_size: int | None = None,
    top_k: int | None = None,
    gate: GateLike | None = None,
    megatron_version: None = None,
    *,
    balance_strategy: str | None = None,
    balance_loss_weight: float = 1.0,
) -> nn.Module:
    """Replace the MLPs of a Megatron-Core model by `MegatronMLP`s with fresh experts, in place.

    Call it on each process after the model is built, before Float16Module, DistributedDataParallel and the optimizer.

    Args:
        model: built, a `GPTModel` or another.
        distributed_experts: None is True.
        megatron_version: was for patched Megatron-LM.
        fmoe_num_experts, hidden_hidden_size, top_k, gate, balance_strategy, balance_loss_weight: as of `MegatronMLP`.

    Returns:
        The model.

    Raises:
        ValueError: nothing to replace, an argument that does not fit, or a model that is wrapped already. The model is
            then unchanged.
    """
    if megatron_version is not None:
        raise ValueError(
            f"megatron_version={megatron_version!r} is of Megatron-LM as FastMoE patched it; fmoefy takes models of "
            "Megatron-Core now: leave it out"
        )
    check_bare(model)
    chosen = [place for _, place in places(model)]
    if not chosen:
        raise ValueError(f"found no MLP of Megatron-Core in {type(model).__name__}")
    put_layers(
        chosen,
        lambda place: MegatronMLP(
            place.block.config,
            None,
            fmoe_num_experts,
            hidden_hidden_size,
            top_k,
            gate,
            balance_strategy=balance_strategy,
            balance_loss_weight=balance_loss_weight,
            distributed_experts=distributed_experts is not False,
        ),
    )
    return model
