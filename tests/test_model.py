"""Statistics and parameter counts of a whole model."""

import math

import pytest
import torch
from torch import nn

import fastmoe


def sent_to(ids_TK, scores_TE=None, losses=None):
    """A layer whose router sends tokens where `ids_TK` says, with weight 1."""

    class Fixed(fastmoe.Router):
        def forward(self, x_TD):
            ids = torch.tensor(ids_TK)
            return fastmoe.Routing.from_topk(ids, torch.ones(ids.shape), 4, losses or {}, scores_TE)

    layer = fastmoe.MoE(3, 4, 2, router=Fixed)
    layer(torch.randn(len(ids_TK), 3))
    return fastmoe.stats(layer)[""]


def test_hand_counts():
    stats = sent_to([[0, 1], [0, 3], [-1, 0], [0, -1]], losses={"mine": torch.tensor(0.5)})
    assert stats.counts.tolist() == [4, 1, 0, 1]
    assert stats.load.tolist() == pytest.approx([4 / 6, 1 / 6, 0, 1 / 6])
    assert stats.dead == [2]
    assert stats.dropped == 2
    assert stats.losses == {"mine": 0.5}
    assert stats.entropy is None
    assert str(stats) == "4 experts, load 0.0% to 66.7%, 1 dead, 2 dropped, entropy -, losses: mine 0.5"


def test_entropy():
    sure = [1.0, 0.0, 0.0, 0.0]
    even = [0.25] * 4
    scaled = [0.2, 0.2, 0.0, 0.0]  # scores need not sum to 1
    stats = sent_to([[0, 1]] * 3, scores_TE=torch.tensor([sure, even, scaled]))
    assert stats.entropy == pytest.approx((0 + math.log(4) + math.log(2)) / 3)


def test_nothing_is_kept_alive_and_layers_that_have_not_run_are_left_out():
    model = nn.ModuleDict({"a": fastmoe.MoE(3, 4), "b": fastmoe.MoE(3, 4)})
    assert fastmoe.stats(model) == {}
    model["a"](torch.randn(5, 3))
    (stats,) = fastmoe.stats(model).values()
    assert list(fastmoe.stats(model)) == ["a"]
    tensors = [stats.offsets_E, stats.mean_entropy, *stats.loss_values.values()]
    assert not any(t.requires_grad for t in tensors)
    assert stats.load.sum().item() == pytest.approx(1)


def test_moe_layers_by_name():
    shared = fastmoe.MoE(3, 4)
    model = nn.Sequential(nn.Linear(3, 3), shared, nn.Sequential(shared, fastmoe.MoE(3, 2)))
    assert list(fastmoe.moe_layers(model)) == ["1", "2.1"]
    assert fastmoe.moe_layers(nn.Linear(3, 3)) == {}


def test_summary_by_hand():
    model = nn.Sequential(
        nn.Linear(3, 3, bias=False),  # 9
        fastmoe.MoE(3, 4, 2, d_hidden=5, bias=False),  # router 12, experts 4 x 30
        fastmoe.MoE(3, 4, 1, d_hidden=5, activation="swiglu"),  # router 12, experts 4 x (30 + 10 + 15 + 3)
        fastmoe.MoE(3, 4, 3, d_hidden=2, bias=False, shared_d_hidden=7),  # router 12, experts 4 x 12, shared 42
        fastmoe.MoE(3, 4, 2, expert=[nn.Identity(), nn.Linear(3, 3), nn.Linear(3, 3), nn.Identity()]),  # 12 + 24
    )
    summary = fastmoe.summary(model)
    assert [(layer.total_params, layer.active_params) for layer in summary.layers] == [
        (132, 12 + 60), (12 + 4 * 58, 12 + 58), (12 + 48 + 42, 12 + 36 + 42), (36, 12 + 12)]  # fmt: skip
    assert [(layer.name, layer.num_experts, layer.top_k) for layer in summary.layers] == [
        ("1", 4, 2), ("2", 4, 1), ("3", 4, 3), ("4", 4, 2)]  # fmt: skip
    assert summary.total_params == sum(p.numel() for p in model.parameters())
    assert summary.active_params == 9 + 72 + 70 + 90 + 24
    printed = str(summary).splitlines()
    assert printed[0].split() == ["layer", "experts", "top_k", "parameters", "active", "per", "token"]
    assert printed[2].split() == ["1", "4", "2", "132", "72"]
    assert printed[-1].split() == ["whole", "model", "523", "265"]


def test_what_experts_share_is_always_active():
    one = nn.Linear(3, 3)
    layer = fastmoe.MoE(3, 4, 1, expert=[one, one, one, nn.Linear(3, 3)])
    (row,) = fastmoe.summary(layer).layers
    assert (row.total_params, row.active_params) == (12 + 24, 12 + 12 + 3)
    activated = fastmoe.MoE(3, 4, 1, d_hidden=5, activation=nn.PReLU())
    assert fastmoe.summary(activated).active_params == 12 + 1 + 38
    assert str(fastmoe.summary(layer)).splitlines()[2].startswith("(the model)")


def test_a_layer_at_two_places_counts_once():
    layer = fastmoe.MoE(3, 4, 2, d_hidden=5)
    twice, once = fastmoe.summary(nn.Sequential(layer, layer)), fastmoe.summary(layer)
    assert (twice.total_params, twice.active_params) == (once.total_params, once.active_params)
