"""One layer on a layout of processes, with what Megatron does to gradients done by hand, to be put together again.

Imported anywhere; all but `put_together` is called only where Megatron-Core runs.
"""

import torch
import torch.distributed as dist

S, B, D, E = 8, 2, 16, 4
OF_STACKED = {"w1": ("linear_fc1", "weight"), "b1": ("linear_fc1", "bias"),
              "w2": ("linear_fc2", "weight"), "b2": ("linear_fc2", "bias")}  # fmt: skip


def config_of(**overrides):
    """A configuration for the process groups that there are."""
    from megatron.core import parallel_state
    from megatron.core.transformer.transformer_config import TransformerConfig

    tp = parallel_state.get_tensor_model_parallel_world_size()
    chosen = {
        "num_layers": 1,
        "hidden_size": D,
        "ffn_hidden_size": 24,
        "num_attention_heads": 2,
        "num_moe_experts": E,
        "moe_router_topk": 2,
        "use_cpu_initialization": True,
        "init_method_std": 0.3,
        "add_bias_linear": False,
        "bias_activation_fusion": False,
        "moe_token_dispatcher_type": "alltoall",
        "tensor_model_parallel_size": tp,
        "sequence_parallel": tp > 1,
        "context_parallel_size": parallel_state.get_context_parallel_world_size(),
        "expert_model_parallel_size": parallel_state.get_expert_model_parallel_world_size(),
        "expert_tensor_parallel_size": parallel_state.get_expert_tensor_parallel_world_size(),
        **overrides,
    }
    return TransformerConfig(**chosen)


def build(kind, config, options):
    """`FastMoELayer`; or Megatron's own layer with the same weights, around its own experts or fastmoe's."""
    from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules
    from megatron.core.transformer.spec_utils import ModuleSpec

    from fastmoe.integrations.megatron import FastMoEExperts, FastMoELayer

    torch.manual_seed(7)
    ours = FastMoELayer(config, **options)
    ours.set_layer_number(1)
    if kind == "layer":
        return ours
    made = MoESubmodules(experts=FastMoEExperts) if kind == "experts" else _own_submodules()
    theirs = ModuleSpec(module=MoELayer, submodules=made)(config=config)
    theirs.set_layer_number(1)
    with torch.no_grad():
        for name, parameter in ours.moe.router.proj.named_parameters():
            getattr(theirs.router, name).copy_(parameter)
        if ours.moe.shared is not None:
            theirs.shared_experts.linear_fc1.weight.copy_(ours.moe.shared.w1.weight)
            theirs.shared_experts.linear_fc2.weight.copy_(ours.moe.shared.w2.weight)
        for name, stacked in ours.moe.experts.named_parameters():
            if kind == "experts":
                getattr(theirs.experts.stacked, name).copy_(stacked)
            else:
                for local, matrix in zip(theirs.experts.local_experts, stacked, strict=True):
                    part, attribute = OF_STACKED[name]
                    getattr(getattr(local, part), attribute).copy_(matrix)
    return theirs


def _own_submodules():
    """Megatron's experts and shared expert of plain PyTorch."""
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec

    spec = get_gpt_layer_local_spec(num_experts=E).submodules.mlp
    return getattr(spec, "submodules", None) or spec.keywords["submodules"]


def run_layer(kind="layer", overrides=None, options=None, replicas=1, padding=False, train=True):
    """Output, gradients of the input and of every parameter, with their places in the whole; and Megatron's metrics.

    The batch is that of `replicas` copies of the model. On fewer of them one takes the others' after its own.
    """
    from megatron.core import parallel_state
    from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler

    config = config_of(**({"params_dtype": torch.float64} | (overrides or {})))
    layer = build(kind, config, options or {}).train(train)
    draw = torch.Generator().manual_seed(11)
    x, g = (torch.randn(S, replicas * B, D, generator=draw, dtype=torch.float64) for _ in range(2))
    x, g = x.to(config.params_dtype), g.to(config.params_dtype)
    here = parallel_state.get_data_parallel_world_size()
    mine = [parallel_state.get_data_parallel_rank()] if here > 1 else list(range(replicas))
    scale = parallel_state.get_context_parallel_world_size() / len(mine)  # as Megatron's schedules have it
    MoEAuxLossAutoScaler.set_loss_scale(torch.tensor(scale))
    outputs, grads = {}, {}
    for replica in mine:
        rows, columns = _rows(config), slice(replica * B, (replica + 1) * B)
        x_part = x[rows, columns].clone().requires_grad_()
        mask = None
        if padding:
            mask = torch.zeros(B, S, dtype=torch.bool)
            mask[0, S - 3 :] = True
            mask = mask[:, rows]
        y, bias = layer(x_part, padding_mask=mask)
        assert bias is None
        (y * g[rows, columns]).sum().mul(scale).backward()
        outputs[rows.start, replica], grads[rows.start, replica] = y.detach(), x_part.grad / scale
    return {"y": outputs, "dx": grads, "parameters": _reduced(layer, config, kind), "metrics": metrics()}


def _rows(config):
    """This process's part of a sequence."""
    from megatron.core import parallel_state

    size, rank = parallel_state.get_context_parallel_world_size(), parallel_state.get_context_parallel_rank()
    if config.sequence_parallel:
        parts = parallel_state.get_tensor_model_parallel_world_size()
        size, rank = size * parts, rank * parts + parallel_state.get_tensor_model_parallel_rank()
    return slice(rank * S // size, (rank + 1) * S // size)


def _reduced(layer, config, kind):
    """By name: gradient, first expert, part of the hidden width."""
    from megatron.core import parallel_state

    found = {}
    replicas = parallel_state.get_data_parallel_world_size(with_context_parallel=True)
    for name, parameter in layer.named_parameters():
        grad = parameter.grad.clone()
        expert = not getattr(parameter, "allreduce", True)
        group = (
            parallel_state.get_expert_data_parallel_group()
            if expert
            else parallel_state.get_data_parallel_group(with_context_parallel=True)
        )
        dist.all_reduce(grad, group=group)
        if config.sequence_parallel and getattr(parameter, "sequence_parallel", False):
            dist.all_reduce(grad, group=parallel_state.get_tensor_model_parallel_group())
        found[_common_name(name)] = grad / replicas
    if kind == "megatron":
        found = _stacked(found)
    first = parallel_state.get_expert_model_parallel_rank() * len(found["w1"])
    part = parallel_state.get_expert_tensor_parallel_rank()
    return {name: (grad, first, part) for name, grad in found.items()}


def _common_name(name):
    name = name.removeprefix("moe.").removeprefix("experts.").removeprefix("stacked.")
    for ours, theirs in (("router.proj.", "router."), ("shared.w", "shared_experts.linear_fc")):
        name = name.replace(ours, theirs)
    return name


def _stacked(found):
    """Megatron's experts under fastmoe's names."""
    stacked = {name: grad for name, grad in found.items() if not name.startswith("local_experts.")}
    count = 1 + max(int(name.split(".")[1]) for name in found if name not in stacked)
    for name, (part, attribute) in OF_STACKED.items():
        keys = [f"local_experts.{i}.{part}.{attribute}" for i in range(count)]
        if keys[0] in found:
            stacked[name] = torch.stack([found[key] for key in keys])
    return stacked


def metrics():
    """What Megatron's tracker holds for this layer, and would reduce and log; emptied."""
    try:
        from megatron.core.transformer.moe.moe_logging import get_moe_metrics_tracker
    except ImportError:
        from megatron.core.transformer.moe import moe_utils

        moe_utils.reduce_aux_losses_tracker_across_ranks()
        tracker = moe_utils.get_moe_layer_wise_logging_tracker()
        values = {name: entry["values"].clone() for name, entry in tracker.items()}
        moe_utils.clear_aux_losses_tracker()
        return values
    tracker = get_moe_metrics_tracker()
    tracker._sync_metrics(list(tracker.metrics))
    values = {name: entry.values.clone() for name, entry in tracker.metrics.items()}
    tracker.clear()
    return values


def put_together(answers, gated=True):
    """One answer for the whole layer from those of all processes, which must agree where they hold the same."""
    y, dx = ({key: value for answer in answers for key, value in answer[what].items()} for what in ("y", "dx"))
    rows, columns = ({key[i] for key in y} for i in (0, 1))
    whole = {"y": _tiled(y, rows, columns), "dx": _tiled(dx, rows, columns)}
    for name in answers[0]["parameters"]:
        pieces = {}
        for answer in answers:
            grad, first, part = answer["parameters"][name]
            key = (0, 0) if name not in OF_STACKED else (first, 0 if name == "b2" else part)
            if key in pieces:
                torch.testing.assert_close(
                    grad, pieces[key], rtol=0, atol=1e-9 if grad.dtype == torch.float64 else 1e-5
                )
            pieces[key] = grad
        whole[name] = _experts_together(name, pieces, gated)
    whole["metrics"] = answers[0]["metrics"]
    return whole


def _tiled(pieces, rows, columns):
    return torch.cat([torch.cat([pieces[row, column] for column in sorted(columns)], 1) for row in sorted(rows)])


def _experts_together(name, pieces, gated):
    firsts, parts = (sorted({key[i] for key in pieces}) for i in (0, 1))
    if name not in OF_STACKED or len(parts) == 1:
        return torch.cat([pieces[first, 0] for first in firsts])
    dim = 2 if name == "w2" else 1
    halves = 2 if gated and name != "w2" else 1
    return torch.cat(
        [
            torch.cat([pieces[first, part].chunk(halves, dim)[half] for half in range(halves) for part in parts], dim)
            for first in firsts
        ]
    )


def messages():
    """The errors of layers that cannot be, by case."""
    from fastmoe.integrations.megatron import FastMoELayer

    recomputed = {"recompute_granularity": "selective", "recompute_modules": ["moe_act"], "moe_grouped_gemm": True}
    cases = {
        "other number": ({}, {"num_experts": 8}),
        "unsupported": ({"moe_input_jitter_eps": 0.1}, {}),
        "double": ({"moe_router_dtype": "fp64"}, {}),
        "sinkhorn": ({"moe_router_load_balancing_type": "sinkhorn", "moe_z_loss_coeff": 0.1}, {}),
        "by chance": ({"moe_router_force_load_balancing": True, "moe_expert_capacity_factor": 1.0}, {}),
        "sequences": ({"moe_router_load_balancing_type": "seq_aux_loss"}, {"router": "expert_choice"}),
        "loss free": ({}, {"router": "loss_free"}),
        "recomputed": (recomputed, {}),
        "two routers": ({"moe_aux_loss_coeff": 0.1}, {"router": "switch"}),
        "unknown kind": ({"moe_router_load_balancing_type": "by chance"}, {}),
        "activation": ({"gated_linear_unit": True, "activation_func": torch.tanh}, {}),
        "submodules": ({}, {"submodules": object()}),
    }
    return {name: _message(lambda o=o, k=k: FastMoELayer(config_of(**o), **k)) for name, (o, k) in cases.items()}


def messages_of_two():
    """As `messages`, for two processes of tensor parallelism whose experts are whole."""
    from fastmoe.integrations.megatron import FastMoELayer

    def without_sequence_parallelism():
        layer = FastMoELayer(config_of(sequence_parallel=False))
        layer(torch.randn(S, B, D))

    return {"no sequence parallelism": _message(without_sequence_parallelism)}


def _message(make):
    try:
        make()
    except ValueError as error:
        return str(error)
    return "no error"
