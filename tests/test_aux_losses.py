"""Balance losses reach the gradients once, attached or collected, whatever surrounds the layer."""

import pytest
import torch
from helpers import gradients
from torch import nn
from torch.utils.checkpoint import checkpoint

import fastmoe

OPTIONS = {
    "stacked": {"d_hidden": 5},
    "modules": {"expert": lambda: nn.Linear(6, 6)},
    "callable": {"d_hidden": 5, "activation": torch.sin},
    "one": {"d_hidden": 5, "top_k": 1},
    "shared": {"d_hidden": 5, "shared_d_hidden": 4},
}


class Net(nn.Module):
    """Two MoE layers; with `again`, the second is called twice. `wrap` may put a layer's call under checkpointing."""

    def __init__(self, kind="stacked", again=False):
        super().__init__()
        losses = {"aux_loss_weight": 0.3, "z_loss_weight": 0.1}
        layers = [fastmoe.MoE(6, 4, router_options=losses, **OPTIONS[kind]) for _ in range(2)]
        self.first, self.second = layers
        self.again, self.wrap = again, lambda layer, x: layer(x)
        self.double()

    def forward(self, x):
        x = x + self.wrap(self.first, x)
        x = x + self.wrap(self.second, x)
        return x + self.wrap(self.second, x) if self.again else x


def data(tokens=11):
    return torch.randn(2, tokens, 6, dtype=torch.float64)


def loss_of(net, x, upstream):
    return (net(x) * upstream).sum()


def attached(net, x, upstream):
    net.zero_grad()
    loss_of(net, x, upstream).backward()
    return gradients(net)


def collected(net, x, upstream, weight=1.0):
    net.zero_grad()
    with fastmoe.collect_aux_losses(net) as losses:
        loss = loss_of(net, x, upstream)
    (loss + weight * losses.total()).backward()
    return gradients(net)


def without(net, x, upstream):
    return collected(net, x, upstream, weight=0.0)


def assert_same(got, expected):
    assert got.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(got[name], expected[name], msg=lambda m, n=name: f"{n}: {m}")


def assert_differ(a, b, layers=("first", "second")):
    for layer in layers:
        name = f"{layer}.router.proj.weight"
        assert (a[name] - b[name]).abs().max() > 1e-4, "the balance loss does not show in the router's gradient"


def reentrant(layer, x):
    return checkpoint(layer, x, use_reentrant=True)


def non_reentrant(layer, x):
    return checkpoint(layer, x, use_reentrant=False)


@pytest.mark.parametrize("kind", OPTIONS)
@pytest.mark.parametrize("again", [False, True])
def test_attached_is_collected(kind, again):
    net, (x, upstream) = Net(kind, again), data()
    got = attached(net, x, upstream)
    assert_same(got, collected(net, x, upstream))
    assert_differ(got, without(net, x, upstream))


def test_what_is_collected():
    net, (x, _) = Net(again=True), data()
    with fastmoe.collect_aux_losses(net) as losses:
        net(x)
    layers = ["first", "first", "second", "second", "second", "second"]
    assert [(loss.layer, loss.name) for loss in losses] == list(zip(layers, ["load_balance", "z"] * 3, strict=True))
    probs_TE = torch.softmax(net.first.router.proj(x), 1)
    ids_TK = probs_TE.topk(2).indices
    expected = 0.3 * fastmoe.routers.load_balance_loss(probs_TE, ids_TK)
    torch.testing.assert_close(losses[0].value, expected)
    torch.testing.assert_close(losses.total(), sum(loss.value for loss in losses))
    assert losses.total().requires_grad
    assert fastmoe.stats(net)["first"].losses["load_balance"] == pytest.approx(expected.item())
    assert fastmoe.AuxLosses().total().item() == 0


def test_the_output_is_untouched():
    net, (x, _) = Net(), data()
    training = net(x)
    with fastmoe.collect_aux_losses(net):
        collecting = net(x)
    assert torch.equal(training, collecting)
    assert torch.equal(training, net.eval()(x))


def test_evaluation_attaches_nothing_but_may_be_collected():
    net, (x, upstream) = Net().eval(), data()
    assert_same(attached(net, x, upstream), without(net, x, upstream))
    with fastmoe.collect_aux_losses(net) as losses:
        net(x)
    assert len(losses) == 4


@pytest.mark.parametrize("kind", OPTIONS)
@pytest.mark.parametrize("wrap", [reentrant, non_reentrant])
@pytest.mark.parametrize("again", [False, True])
def test_attached_under_checkpointing(kind, wrap, again):
    net, (x, upstream) = Net(kind, again), data()
    x.requires_grad_()  # reentrant checkpointing asks for it
    expected = attached(net, x, upstream)
    net.wrap = wrap
    assert_same(attached(net, x, upstream), expected)


@pytest.mark.parametrize("kind", OPTIONS)
@pytest.mark.parametrize("inside", [True, False], ids=["backward inside", "backward after"])
def test_collected_under_checkpointing(kind, inside):
    net, (x, upstream) = Net(kind), data()
    expected = attached(net, x, upstream)
    net.wrap = non_reentrant
    net.zero_grad()
    with fastmoe.collect_aux_losses(net) as losses:
        loss = loss_of(net, x, upstream)
        loss = loss + losses.total()
        if inside:
            loss.backward()
    if not inside:
        loss.backward()
    assert len(losses) == 4
    assert_same(gradients(net), expected)


def test_collecting_under_reentrant_checkpointing_is_refused():
    net, (x, upstream) = Net(), data()
    net.wrap = reentrant
    with fastmoe.collect_aux_losses(net):
        loss = loss_of(net, x.requires_grad_(), upstream)
        with pytest.raises(RuntimeError, match=r"losses of '\w+' were collected without gradient.*use_reentrant=False"):
            loss.backward()
    net.wrap = lambda layer, x: layer(x)
    assert_differ(attached(net, x, upstream), without(net, x, upstream))  # the context was left in good order


def test_accumulation():
    """n micro-batches, each loss divided by n: the mean of the n gradients."""
    net, steps = Net(), 3
    batches = [data() for _ in range(steps)]
    whole = [attached(net, *batch) for batch in batches]
    expected = {name: sum(grads[name] for grads in whole) / steps for name in whole[0]}
    net.zero_grad()
    fastmoe.set_aux_loss_scale(net, 1 / steps)
    for x, upstream in batches:
        (loss_of(net, x, upstream) / steps).backward()
    assert_same(gradients(net), expected)


@pytest.mark.parametrize("scale", [2.0**16, torch.tensor(2.0**16)])
def test_a_loss_scaler(scale):
    net, (x, upstream) = Net(), data()
    expected = attached(net, x, upstream)
    fastmoe.set_aux_loss_scale(net, scale)
    net.zero_grad()
    (loss_of(net, x, upstream) * scale).backward()
    assert_same({name: grad / float(scale) for name, grad in gradients(net).items()}, expected)


def test_a_bad_loss_scale():
    with pytest.raises(ValueError, match=r"a tensor of no dimension, got tensor"):
        fastmoe.set_aux_loss_scale(Net(), torch.ones(1))


@pytest.mark.parametrize("kind", ["stacked", "modules", "callable"])
def test_autocast(kind):
    net, (x, upstream) = Net(kind).float(), data().float()
    with torch.autocast("cpu", torch.bfloat16):
        got = attached(net, x, upstream)
        by_hand = collected(net, x, upstream)
        none = without(net, x, upstream)
    for name in got:
        torch.testing.assert_close(got[name], by_hand[name], rtol=2e-2, atol=1e-2)
    assert_differ(got, none)


def test_an_output_of_zero_weight_still_balances():
    """The main loss need not depend on the output's values for the balance loss to flow."""
    net, (x, upstream) = Net(), data()
    got = attached(net, x, torch.zeros_like(upstream))
    net.zero_grad()
    with fastmoe.collect_aux_losses(net) as losses:
        net(x)
    losses.total().backward()
    for name in ("first.router.proj.weight", "second.router.proj.weight"):
        torch.testing.assert_close(got[name], net.get_parameter(name).grad)


def test_a_loss_whose_routing_weights_are_constant():
    class Constant(fastmoe.Router):
        def forward(self, x_TD):
            probs_TE = self.proj(x_TD).softmax(1)
            ids_TK = probs_TE.topk(self.top_k).indices
            losses = {"mine": probs_TE.square().sum()}
            ones = torch.ones_like(ids_TK, dtype=x_TD.dtype)
            return fastmoe.Routing.from_topk(ids_TK, ones, self.num_experts, losses)

    layer, (x, upstream) = fastmoe.MoE(6, 4, router=Constant).double(), data()
    layer(x).backward(upstream)
    expected = torch.autograd.grad(torch.softmax(layer.router.proj(x), 1).square().sum(), layer.router.proj.weight)
    torch.testing.assert_close(layer.router.proj.weight.grad, expected[0])


def test_contexts_nest_and_survive_errors():
    net, (x, upstream) = Net(), data()
    expected = attached(net, x, upstream)
    with fastmoe.collect_aux_losses(net) as outer:
        with fastmoe.collect_aux_losses(net.second) as inner:
            net(x)
        net(x)
    assert (len(outer), len(inner)) == (6, 2)
    with pytest.raises(ZeroDivisionError), fastmoe.collect_aux_losses(net):
        raise ZeroDivisionError
    assert_same(attached(net, x, upstream), expected)


def test_a_router_for_one_expert_a_token_learns_from_the_main_loss():
    layer, (x, upstream) = fastmoe.MoE(6, 4, 1, router_options={"aux_loss_weight": 0}).double(), data()
    layer(x).backward(upstream)
    assert layer.router.proj.weight.grad.abs().max() > 1e-3


@pytest.mark.parametrize("scale", ["1", None, float("nan"), float("inf")])
def test_a_loss_scale_is_a_finite_number(scale):
    with pytest.raises(ValueError, match="scale must be a finite number"):
        fastmoe.set_aux_loss_scale(fastmoe.MoE(4, 2), scale)


@pytest.mark.parametrize("reentrant", [False, True])
def test_collecting_inside_a_checkpointed_function(reentrant):
    torch.manual_seed(0)
    layer, x = fastmoe.MoE(8, 4, 2, d_hidden=4).double(), torch.randn(6, 8, dtype=torch.float64)

    def run(x):
        with fastmoe.collect_aux_losses(layer) as losses:
            y = layer(x)
        return y.square().sum() + losses.total()

    grads = []
    for function in (run, lambda x: checkpoint(run, x, use_reentrant=reentrant)):
        layer.zero_grad()
        function(x.clone().requires_grad_()).backward()
        grads.append(layer.router.proj.weight.grad)
    torch.testing.assert_close(*grads)
