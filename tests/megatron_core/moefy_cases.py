"""What tests of `moefy`, of specs and of experts of one's own do where Megatron-Core runs."""

import torch
from megatron_hybrid import hybrid
from megatron_models import batch, config, dense, gpt, loss_of
from megatron_training import forward_backward, optimizer_of, parallel
from torch import nn


def converted(**options):
    """Names of the new layers, and what Megatron's configuration says afterwards."""
    import fastmoe

    model = fastmoe.moefy(dense({"num_layers": 4, "moe_router_load_balancing_type": "aux_loss"}), 4, **options)
    losses = loss_of(model, batch(0))
    losses.mean().backward()
    router = next(iter(fastmoe.model.moe_layers(model).values())).router
    return {
        "layers": list(fastmoe.model.moe_layers(model)),
        "again": list(fastmoe.model.moe_layers(fastmoe.moefy(model, 4, **options))),
        "num_moe_experts": model.config.num_moe_experts,
        "aux_loss_weight": router.aux_loss_weight,
        "summary": fastmoe.summary(model).total_params,
        "own": sum(parameter.numel() for parameter in model.parameters()),
        "stats": len(fastmoe.stats(model)),
        "grads": all(parameter.grad is not None for parameter in model.parameters()),
    }


def errors():
    """By case, the message, and whether the model is as it was."""
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig

    import fastmoe

    wrapped = dense()
    cases = {
        "wrapped": lambda m: fastmoe.moefy(
            DistributedDataParallel(wrapped.config, DistributedDataParallelConfig(), wrapped), 4
        ),
        "nothing": lambda m: fastmoe.moefy(m, 4, target="*.attention"),
        "init": lambda m: fastmoe.moefy(m, 4, init="copy"),
        "width": lambda m: fastmoe.moefy(m, 4, d_hidden=7),
        "expert": lambda m: fastmoe.moefy(m, 4, expert=lambda: nn.Identity()),
        "option": lambda m: fastmoe.moefy(m, 4, experts=3),
        "weights": lambda m: fastmoe.moefy(m, 4, router_options={"normalize": False}),
        "native": lambda m: fastmoe.moefy(m, 4, to_native=True),
        "soft": lambda m: fastmoe.moefy(m, 4, router="soft"),
    }
    found = {}
    for name, convert in cases.items():
        model = dense()
        before = str(model), model.config.num_moe_experts
        try:
            convert(model)
            message = "no error"
        except (ValueError, TypeError) as error:
            message = f"{type(error).__name__}: {error}"
        found[name] = message, (str(model), model.config.num_moe_experts) == before
    return found


def hybrid_outputs():
    """A hybrid model's loss before and after, and where the new layers are."""
    import fastmoe

    model = hybrid({"moe_router_load_balancing_type": "none"}, spec=None).eval()
    with torch.no_grad():
        before = loss_of(model, batch(0))
        fastmoe.moefy(model, num_experts=4)
        return before, loss_of(model, batch(0)), list(fastmoe.model.moe_layers(model))


def norm_inside():
    """A model whose MLP has its norm inside, as with Transformer Engine, and what becomes of it."""
    from megatron.core.transformer.identity_op import IdentityOp

    import fastmoe

    model = dense({"normalization": "LayerNorm"})
    before = loss_of(model, batch(0)).detach()
    for layer in model.decoder.layers:
        norm, layer.pre_mlp_layernorm = layer.pre_mlp_layernorm, IdentityOp()
        with torch.no_grad():
            norm.weight.uniform_(0.5, 1.5)
            norm.bias.uniform_(-0.5, 0.5)
        first = layer.mlp.linear_fc1
        first.layer_norm_weight, first.layer_norm_bias = (
            nn.Parameter(value.detach().clone()) for value in (norm.weight, norm.bias)
        )
        first.forward = _after_norm(first, norm)
    inside = loss_of(model, batch(0)).detach()
    assert not torch.allclose(before, inside)
    model = fastmoe.moefy(model, num_experts=4)
    return inside, loss_of(model, batch(0)).detach(), [name for name, _ in model.named_parameters()]


def _after_norm(linear, norm):
    plain = linear.forward
    return lambda x, *args, **kwargs: plain(norm(x), *args, **kwargs)


class Own(nn.Module):
    """An expert of one's own."""

    def __init__(self):
        super().__init__()
        self.inner, self.scale = nn.Linear(32, 8), nn.Linear(8, 32)

    def forward(self, rows):
        return self.scale(self.inner(rows).tanh())


class ByHand:
    """A router of one's own: half to each of two experts."""

    def __new__(cls, d_model, num_experts, top_k):
        import fastmoe

        class Router(fastmoe.Router):
            def forward(self, x_TD):
                weights_TK, ids_TK = self.proj(x_TD).sigmoid().topk(self.top_k)
                return fastmoe.Routing.from_topk(ids_TK, weights_TK, self.num_experts)

        return Router(d_model, num_experts, top_k)


def own_spec_of(chosen):
    from megatron_models import own_spec

    from fastmoe.integrations.megatron import gpt_layer_spec

    return gpt_layer_spec(4, layer_spec=own_spec(chosen), expert=Own, router=ByHand)


def block_spec_of(chosen):
    """Every second layer of experts, by Megatron's own `moe_layer_freq`."""
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec

    from fastmoe.integrations.megatron import gpt_layer_spec

    return gpt_layer_spec(4, layer_spec=get_gpt_decoder_block_spec(chosen, use_transformer_engine=False))


def every_second():
    import fastmoe

    model = gpt({"num_layers": 4, "moe_layer_freq": 2}, block_spec_of)
    loss_of(model, batch(0)).mean().backward()
    return list(fastmoe.model.moe_layers(model))


def expert_bias_after_a_step():
    """The bias of each layer after a step of Megatron's loop, and the loads that moved it."""
    from model_cases import layer_spec

    import fastmoe

    options = {"moe_router_score_function": "sigmoid", "moe_router_enable_expert_bias": True}
    model = gpt(options, layer_spec)
    layers = fastmoe.model.moe_layers(model).values()
    model = parallel(model)
    optimizer = optimizer_of(model)
    forward_backward(model, 2)
    loads = [layer.last_stats.load.tolist() for layer in layers]
    optimizer.step()
    left = [layer.router.local_tokens_per_expert.tolist() for layer in layers]
    return [layer.router.bias_E.tolist() for layer in layers], loads, left


def all_arguments():
    """The names of Megatron's arguments about MoE, and those in each of the tables."""
    from fastmoe.integrations.megatron import arguments

    names = type(config()).__dataclass_fields__
    about_moe = [name for name in names if name.startswith(("moe_", "num_moe_", "overlap_moe"))]
    return about_moe, [list(arguments.READ), list(arguments.OF_NO_EFFECT), list(arguments.UNSUPPORTED)]


def same_values_of_others():
    """Values from Megatron's layer to fastmoe's, and the error where models differ."""
    from model_cases import layer_spec

    from fastmoe.integrations.megatron import same_values

    theirs, ours = gpt(), gpt(None, layer_spec)
    same_values(theirs, ours)
    losses = loss_of(theirs, batch(0)).detach(), loss_of(ours, batch(0)).detach()
    try:
        same_values(dense(), ours)
    except ValueError as error:
        return *losses, str(error)
    return *losses, "no error"


def weights_of_balance_losses():
    """Of two models from one configuration, as a pipeline stage's are; and of a model converted in two calls."""
    import fastmoe
    from fastmoe.integrations.megatron import moefy

    said_nothing = {"num_layers": 4, "moe_router_load_balancing_type": "aux_loss"}
    first, second = dense(said_nothing), dense(said_nothing)
    for part in second.modules():
        if hasattr(part, "config"):
            part.config = first.config
    chunks = moefy([first, second], 4)
    in_two = fastmoe.moefy(fastmoe.moefy(dense(said_nothing), 4, every=2), 4)
    models = [*chunks, in_two]
    return [[layer.router.aux_loss_weight for layer in fastmoe.model.moe_layers(model).values()] for model in models]


def warned(overrides, options):
    """What is logged where upcycling cannot keep the outputs."""
    import logging

    import fastmoe

    records = []
    handler = logging.Handler()
    handler.emit = lambda record: records.append(record.getMessage())
    logging.getLogger("fastmoe").addHandler(handler)
    fastmoe.moefy(dense(overrides), 4, **options)
    return records


def norm_without_a_place():
    """The message, and whether the model is as it was, where the second layer's norm could not be moved."""
    import fastmoe

    model = dense()
    model.decoder.layers[1].mlp.linear_fc1.layer_norm_weight = nn.Parameter(torch.ones(32))
    before = str(model), model.config.num_moe_experts
    try:
        fastmoe.moefy(model, num_experts=4)
    except ValueError as error:
        return str(error), (str(model), model.config.num_moe_experts) == before
    return "no error", False
